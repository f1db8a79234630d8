-- Connect: named dblink connections to targets, and one message at a time over them.
--
-- Promises that no wait is longer than its deadline (connecting from PostgreSQL 16 on excepted: dblink
-- ignores connect_timeout there), that a message never outlives its lease, and that an older session of
-- the same writer is gone, or its lease over, before a new one sends anything.
--
-- A connection outlives a rolled back transaction and a setting does not, so no fact about a
-- connection is kept on this side: the offset of the target's clock is a setting (tbl_repl.clock) of the
-- remote session, everything else is in the connection's name.

-- dblink may be installed in any schema; these are bound when they are created, and inlined.
CREATE OR REPLACE FUNCTION tbl_repl._dblink_connect(conn text, conninfo text) RETURNS text
LANGUAGE sql VOLATILE RETURN dblink_connect(conn, conninfo);
COMMENT ON FUNCTION tbl_repl._dblink_connect(text, text) IS 'dblink_connect, wherever dblink is installed';

CREATE OR REPLACE FUNCTION tbl_repl._dblink_disconnect(conn text) RETURNS text
LANGUAGE sql VOLATILE RETURN dblink_disconnect(conn);
COMMENT ON FUNCTION tbl_repl._dblink_disconnect(text) IS 'dblink_disconnect, wherever dblink is installed';

CREATE OR REPLACE FUNCTION tbl_repl._dblink_connections() RETURNS text[]
LANGUAGE sql VOLATILE RETURN dblink_get_connections();
COMMENT ON FUNCTION tbl_repl._dblink_connections() IS 'dblink_get_connections, wherever dblink is installed';

CREATE OR REPLACE FUNCTION tbl_repl._dblink_send(conn text, message text) RETURNS integer
LANGUAGE sql VOLATILE RETURN dblink_send_query(conn, message);
COMMENT ON FUNCTION tbl_repl._dblink_send(text, text) IS 'dblink_send_query, wherever dblink is installed';

CREATE OR REPLACE FUNCTION tbl_repl._dblink_is_busy(conn text) RETURNS integer
LANGUAGE sql VOLATILE RETURN dblink_is_busy(conn);
COMMENT ON FUNCTION tbl_repl._dblink_is_busy(text) IS 'dblink_is_busy, wherever dblink is installed';

CREATE OR REPLACE FUNCTION tbl_repl._dblink_error(conn text) RETURNS text
LANGUAGE sql VOLATILE RETURN dblink_error_message(conn);
COMMENT ON FUNCTION tbl_repl._dblink_error(text) IS 'dblink_error_message, wherever dblink is installed';

-- STABLE so that it is inlined; it stands alone in FROM, where it runs once.
CREATE OR REPLACE FUNCTION tbl_repl._dblink_result(conn text) RETURNS SETOF text
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT r.x FROM dblink_get_result(conn) AS r (x text);
END;
COMMENT ON FUNCTION tbl_repl._dblink_result(text) IS 'dblink_get_result, wherever dblink is installed';

-- Options of the server and of the owner's mapping as a libpq connection string, with bounds added
-- where the options give none.  Runs as the target's owner, who may read his own mapping.  NULL: the
-- mapping cannot be read by its user (a mapping for PUBLIC), so that dblink has to look it up itself.
CREATE OR REPLACE FUNCTION tbl_repl._conninfo(server name, timeout interval, application_name text)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    server_row  record;
    mapping_row record;
BEGIN
    SELECT s.oid, s.srvoptions INTO server_row FROM pg_foreign_server AS s WHERE s.srvname = server;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = format('server %I does not exist', server),
            HINT    = 'Create it with CREATE SERVER ... FOREIGN DATA WRAPPER dblink_fdw OPTIONS (host ..., port ..., dbname ...).';
    END IF;
    IF NOT has_server_privilege(current_user, server_row.oid, 'USAGE') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('permission denied for foreign server %I', server),
            DETAIL  = format('Connections are made as role %I, who defined the target.', current_user),
            HINT    = format('GRANT USAGE ON FOREIGN SERVER %I TO %I;', server, current_user);
    END IF;
    SELECT m.umoptions, m.umuser INTO mapping_row
    FROM pg_user_mappings AS m
    WHERE m.srvid = server_row.oid
      AND m.umuser IN (0, (SELECT r.oid FROM pg_roles AS r WHERE r.rolname = current_user))
    ORDER BY m.umuser DESC
    LIMIT 1;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = format('role %I has no user mapping for server %I', current_user, server),
            DETAIL  = 'Connections are made as the role that defined the target.',
            HINT    = format('CREATE USER MAPPING FOR %I SERVER %I OPTIONS (user ..., password ...);', current_user, server);
    END IF;
    IF mapping_row.umoptions IS NULL AND mapping_row.umuser = 0 THEN
        RETURN NULL;
    END IF;
    RETURN (
        SELECT string_agg(format('%s=''%s''', o.name, replace(replace(o.value, E'\\', E'\\\\'), '''', E'\\''')), ' ')
        FROM (
            SELECT DISTINCT ON (given.name) given.name, given.value
            FROM (
                SELECT option_name AS name, option_value AS value, 1 AS priority
                FROM pg_options_to_table(mapping_row.umoptions)
                UNION ALL
                SELECT option_name, option_value, 2 FROM pg_options_to_table(server_row.srvoptions)
                UNION ALL VALUES
                    ('application_name', application_name, 0),
                    ('connect_timeout', greatest(2, ceil(extract(epoch FROM timeout)))::text, 3),
                    ('tcp_user_timeout', ceil(extract(epoch FROM timeout) * 1000)::bigint::text, 3)
            ) AS given
            -- postgres_fdw's own options mean nothing to libpq
            WHERE given.name <> ALL ('{use_remote_estimate,fdw_startup_cost,fdw_tuple_cost,extensions,updatable,truncatable,fetch_size,batch_size,async_capable,parallel_commit,parallel_abort,analyze_sampling,keep_connections,password_required,use_scram_passthrough,client_encoding,fallback_application_name}'::text[])
            ORDER BY given.name, given.priority
        ) AS o);
END
$function$;
COMMENT ON FUNCTION tbl_repl._conninfo(name, interval, text) IS
    'libpq connection string of a server and the caller''s mapping; NULL where only dblink may read the mapping';

-- What a role has set for its transactions on the target is not meant for ours, which timeout and lease bound.
CREATE OR REPLACE FUNCTION tbl_repl._transaction_session() RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN 'SET default_transaction_isolation = ''read committed''; SET default_transaction_read_only = off; SET default_transaction_deferrable = off; '
       'SET idle_in_transaction_session_timeout = 0; '
       -- of a connection that only one side knows to be lost nothing stays for long there, nor what it has locked
       'SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3; '
       -- from PostgreSQL 17 on
       'SELECT CASE WHEN pg_catalog.current_setting(''transaction_timeout'', true) IS NOT NULL THEN pg_catalog.set_config(''transaction_timeout'', ''0'', false) END';
COMMENT ON FUNCTION tbl_repl._transaction_session() IS 'statements that give a session on a target transactions like ours';

-- origin: where changes were made, said anew with those that are carried on; via: who sends them.
CREATE OR REPLACE FUNCTION tbl_repl._origin_session() RETURNS text
LANGUAGE sql STABLE RETURN format('SET tbl_repl.origin = %1$L; SET tbl_repl.via = %1$L', tbl_repl.node_name());
COMMENT ON FUNCTION tbl_repl._origin_session() IS 'statements that tell a target from which node changes come';

-- _open(conn, server, timeout, deadline, sent_until): opens the named connection and makes it fit for
-- shipping.  sent_until: end of the lease of a message whose connection was lost just now.
-- Runs as the target's owner (called by the generated connect_N).
-- Errors: 08001 and what the target answers; 55P03 if another session of ours is still connecting.
-- Why it is right: application_name carries the node, this backend and the start of this server, so
-- that what an earlier transaction left behind can be told from what is in use.  Nothing is sent before
-- such sessions are gone or the deadline, at least the longest lease they can have, is over.
CREATE OR REPLACE FUNCTION tbl_repl._open(
    conn     text,
    server   name,
    timeout  interval,
    deadline timestamptz,
    sent_until timestamptz DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    node      text := tbl_repl.node_name();
    started   text := to_hex(extract(epoch FROM pg_postmaster_start_time())::bigint);
    conn_hash text := left(md5(regexp_replace(conn, '_[0-9]+$', '')), 4);
    own_name  text := format('tbl_repl %s %s.%s.%s', node, pg_backend_pid(), started, conn_hash);
    conninfo  text;
    lock_key  integer := tbl_repl._connect_key(conn);
    older     text;
    answer    text;
    left_over text;
    stale     integer[];
    lease_ms  numeric := extract(epoch FROM timeout) * 1000;
    lease_end timestamptz;
    foreign_lease boolean;
    began     timestamptz := clock_timestamp();
    why       text;
    hangs     boolean := false;
BEGIN
    conninfo := coalesce(tbl_repl._conninfo(server, timeout, own_name), server);
    FOR older IN
        SELECT c FROM unnest(tbl_repl._dblink_connections()) AS c
        WHERE regexp_replace(c, '_[0-9]+$', '') = regexp_replace(conn, '_[0-9]+$', '')
    LOOP
        PERFORM tbl_repl._dblink_disconnect(older);
    END LOOP;
    BEGIN
        -- One session at a time: where connecting cannot be bounded, only one hangs.  The lock goes back with the
        -- subtransaction, whatever ends it, a cancel included; the connection stays.
        BEGIN
            WHILE NOT pg_try_advisory_xact_lock(tbl_repl._lock_connect(), lock_key) LOOP
                IF clock_timestamp() > deadline THEN
                    PERFORM tbl_repl._cancel_connecting(lock_key);
                    EXIT;
                END IF;
                PERFORM pg_sleep(0.002);
            END LOOP;
            -- Who has waited for long has waited for one that hung, and would hang as well.
            IF clock_timestamp() > least(deadline, began + (deadline - began) / 2) THEN
                RAISE EXCEPTION USING
                    ERRCODE = 'lock_not_available',
                    MESSAGE = format('another session is still connecting to server %I', server);
            END IF;
            PERFORM tbl_repl._dblink_connect(conn, conninfo);
            RAISE EXCEPTION USING ERRCODE = 'TR001', MESSAGE = 'connected';
        EXCEPTION WHEN SQLSTATE 'TR001' THEN
            NULL;
        WHEN query_canceled THEN
            -- by the worker, or by who waits for us: a cancel of somebody else comes earlier
            IF clock_timestamp() < began + (deadline - began) / 2 THEN
                RAISE;
            END IF;
            hangs := true;
            RAISE EXCEPTION USING
                ERRCODE = 'sqlclient_unable_to_establish_sqlconnection',
                MESSAGE = format('server %I does not answer', server),
                DETAIL  = 'Connecting to it took too long, and was cancelled.',
                HINT    = 'See that it runs, and that nothing on the way swallows what is sent to it.';
        END;
        -- What shapes text is pinned, and what bounds waiting; never the search_path, which the
        -- target's own triggers may need.
        answer := tbl_repl._call(conn, format($message$
            SET application_name = %L; SET statement_timeout = %s; SET lock_timeout = %s; %s; %s; %s;
            SELECT pg_catalog.json_build_object(
                'extension', EXISTS (SELECT FROM pg_catalog.pg_namespace AS n WHERE n.nspname = 'tbl_repl'),
                'now', extract(epoch FROM pg_catalog.clock_timestamp()),
                'receipts', %s,
                'older', (SELECT pg_catalog.json_agg(pg_catalog.json_build_object('pid', a.pid, 'name', a.application_name))
                          FROM pg_catalog.pg_stat_activity AS a
                          WHERE a.datname = pg_catalog.current_database() AND a.usename = current_user
                            AND a.pid <> pg_catalog.pg_backend_pid()
                            AND pg_catalog.starts_with(a.application_name, %L)))
            $message$, own_name, ceil(lease_ms * 0.9), ceil(lease_ms * 0.8), tbl_repl._text_session(), tbl_repl._transaction_session(), tbl_repl._origin_session(), tbl_repl._may_leave_receipts(),
            format('tbl_repl %s ', node)), deadline);
        -- Rounded down: the lease may end early, never late.
        PERFORM tbl_repl._call(conn, format(
            'SET tbl_repl.clock = %L; PREPARE tbl_repl_lease (float8) AS SELECT %s; %s',
            round((answer::json ->> 'now')::numeric - extract(epoch FROM clock_timestamp()), 6), tbl_repl._in_time('$1'),
            tbl_repl._prepare_receipt((answer::json ->> 'receipts')::boolean)), deadline);
        SELECT array_agg((o ->> 'pid')::integer), bool_or(m[2] IS DISTINCT FROM started OR m[1]::integer <> pg_backend_pid())
        INTO stale, foreign_lease
        FROM json_array_elements(CASE json_typeof(answer::json -> 'older') WHEN 'array' THEN answer::json -> 'older' ELSE '[]' END) AS o
        CROSS JOIN LATERAL regexp_match(o ->> 'name', '([0-9]+)[.]([0-9a-f]+)[.]([0-9a-f]+)$') AS m
        WHERE m[2] IS DISTINCT FROM started
           OR (m[1]::integer = pg_backend_pid() AND m[3] = conn_hash)
           OR NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.pid = m[1]::integer);
        IF stale IS NOT NULL THEN
            -- This backend never gives up a message before its lease is over, unless it comes here at
            -- once; of one that has died nobody knows what it sent last.
            lease_end := CASE WHEN foreign_lease THEN clock_timestamp() + timeout ELSE coalesce(sent_until, clock_timestamp()) END;
            PERFORM tbl_repl._call(conn, format(
                'SELECT pg_catalog.count(pg_catalog.pg_terminate_backend(p)) FROM pg_catalog.unnest(%L::int[]) AS p', stale), deadline);
            LOOP
                left_over := tbl_repl._call(conn, format(
                    'SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity WHERE pid = ANY (%L::int[])', stale), deadline);
                EXIT WHEN left_over = '0' OR clock_timestamp() > lease_end;
                IF clock_timestamp() > deadline THEN
                    RAISE EXCEPTION USING
                        ERRCODE = 'connection_failure',
                        MESSAGE = 'an older session of this node does not end on the target',
                        DETAIL  = format('Process %s of the target could still apply something older.', array_to_string(stale, ', ')),
                        HINT    = 'It is hung or stopped: end it, or wait.';
                END IF;
                PERFORM pg_sleep(0.002);
            END LOOP;
        END IF;
        IF (answer::json ->> 'extension')::boolean THEN
            PERFORM tbl_repl._check_node(tbl_repl._remote_node(conn, deadline));
        END IF;
    EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
        IF conn = ANY (tbl_repl._dblink_connections()) THEN
            PERFORM tbl_repl._dblink_disconnect(conn);
        ELSIF SQLSTATE = '08001' AND NOT hangs THEN
            -- dblink does not say to whom
            GET STACKED DIAGNOSTICS why = PG_EXCEPTION_DETAIL;
            RAISE EXCEPTION USING
                ERRCODE = 'sqlclient_unable_to_establish_sqlconnection',
                MESSAGE = format('could not connect to server %I', server),
                DETAIL  = why,
                HINT    = 'See that it runs, and that the options of the server and of the user mapping are right.';
        END IF;
        RAISE;
    END;
END
$function$;
COMMENT ON FUNCTION tbl_repl._open(text, name, interval, timestamptz, timestamptz) IS
    'opens a connection to a target, pins its settings, ends older sessions of this writer';

-- SECURITY DEFINER: a writer who waits for a connector that hangs may be another role than that one; it reaches only
-- sessions that are connecting.
CREATE OR REPLACE FUNCTION tbl_repl._cancel_connecting(lock_key bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    -- Up to 15 connect_timeout ends it, and a cancel would hit what comes after the connecting.
    IF current_setting('server_version_num')::integer >= 160000 THEN
        PERFORM pg_cancel_backend(l.pid) FROM pg_locks AS l
        WHERE l.locktype = 'advisory' AND l.granted
          AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
          AND l.classid = tbl_repl._lock_connect()::oid AND l.objid = (lock_key & 4294967295)::oid;
    END IF;
EXCEPTION WHEN insufficient_privilege THEN
    NULL;  -- the extension's owner is no superuser: the connector waits until its own end
END
$function$;
COMMENT ON FUNCTION tbl_repl._cancel_connecting(bigint) IS
    'cancels a session that hangs while connecting to a target';

-- One key for all connections of a role to a server that have the same timeout: who waits for one that hangs cancels it when his
-- own time is over, and its own is then over, too.
CREATE OR REPLACE FUNCTION tbl_repl._connect_key(conn text) RETURNS integer
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT hashtext(regexp_replace(conn, '_[0-9]+$', ''))
$function$;
COMMENT ON FUNCTION tbl_repl._connect_key(text) IS 'second part of the advisory lock connect';

-- Runs on the target: fails (22P02, see _is_lease_over) once its clock has passed the deadline, given in seconds of ours.
CREATE OR REPLACE FUNCTION tbl_repl._in_time(deadline text) RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
RETURN format('(CASE WHEN pg_catalog.date_part(''epoch'', pg_catalog.clock_timestamp()) < %s + pg_catalog.current_setting(''tbl_repl.clock'')::float8 '
              'THEN ''1'' ELSE ''tbl_repl: lease over'' END)::pg_catalog.int4', deadline);
COMMENT ON FUNCTION tbl_repl._in_time(text) IS 'SQL expression that fails on the target after a deadline';

-- In whatever language the target speaks, it quotes what it could not read as a number.
CREATE OR REPLACE FUNCTION tbl_repl._is_lease_over(code text, message text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
RETURN code = '22P02' AND strpos(message, 'tbl_repl: lease over') > 0;
COMMENT ON FUNCTION tbl_repl._is_lease_over(text, text) IS 'whether an error of the target is that of a lease that is over';

-- _send(conn, message): sends without waiting.  Error 08006 when the connection is known to be dead,
-- in which case nothing has been sent.
CREATE OR REPLACE FUNCTION tbl_repl._send(conn text, message text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF tbl_repl._dblink_send(conn, message) <> 1 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'connection_failure',
            MESSAGE = format('could not send to target: %s', tbl_repl._dblink_error(conn));
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._send(text, text) IS 'sends a message over a connection, does not wait';

-- _receive(conn, deadline): the answer to the message sent last: the first column of its last row.
-- Errors: the remote one as it is; 08006 if there is no answer by the deadline, or none any more; 08000 if the target says
-- that the lease is over, so that the message is undone.  In both cases the connection is closed, for with 08000 one of the two
-- clocks may have been set since it was opened.  Other errors of the target leave it usable.
-- A cancel that comes while we wait is kept back until the fate of the message is known, or its lease is
-- over: given up earlier, the message could still take effect after something newer.  At commit it is
-- dropped, elsewhere raised afterwards.  harmless: the message commits nothing, so that a cancel ends the waiting at
-- once, and with the connection everything that was sent in this remote transaction.
CREATE OR REPLACE FUNCTION tbl_repl._receive(
    conn      text,
    deadline  timestamptz,
    at_commit boolean DEFAULT false,
    harmless  boolean DEFAULT false
)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    answer   text;
    line     text;
    turn     timestamptz := clock_timestamp();
    previous timestamptz := turn;
    spinning timestamptz := turn + interval '1000 microseconds';
    in_vain  text := coalesce(substring(current_setting('tbl_repl.spins_in_vain', true) FROM '^[0-9]{1,2}/[0-9]{1,2}$'), '0/0');
    rests    integer := split_part(in_vain, '/', 1);
    longest  integer := split_part(in_vain, '/', 2);
    may_spin boolean := false;
    turns    integer := 0;
    canceled boolean := false;
    code     text;
BEGIN
    -- Spinning is quickest, if the target has a processor to itself.  Only who waits alone spins, or sessions take the
    -- processors from those they wait for: one holds the lock spin, and those who sleep share its neighbour to their
    -- commit, where he sees them.  Who has spun in vain sleeps at once the next times, twice as many times after each
    -- further failure.
    IF rests > 0 THEN
        PERFORM set_config('tbl_repl.spins_in_vain', format('%s/%s', rests - 1, longest), false);
    END IF;
    LOOP
        LOOP
            -- The lock is taken and given back in here: it would outlive the transaction otherwise, whatever ends the waiting.
            BEGIN
                may_spin := rests = 0 AND turns = 0 AND pg_try_advisory_lock(tbl_repl._lock_spin(), 0);
                IF at_commit AND NOT may_spin AND turns = 0 THEN
                    PERFORM pg_try_advisory_xact_lock_shared(tbl_repl._lock_spin(), 1);
                END IF;
                WHILE tbl_repl._dblink_is_busy(conn) = 1 LOOP
                    turn := clock_timestamp();
                    IF turn > deadline THEN
                        EXIT;
                    ELSIF NOT may_spin THEN
                        PERFORM pg_sleep(0.0005);
                        turn := clock_timestamp();
                    ELSIF turn > spinning OR turn - previous > interval '1 millisecond' THEN
                        -- a long turn means that somebody else needed this processor
                        may_spin := false;
                        PERFORM pg_advisory_unlock(tbl_repl._lock_spin(), 0);
                        rests := least(greatest(longest * 2, 1), 64);
                        PERFORM set_config('tbl_repl.spins_in_vain', format('%1$s/%1$s', rests), false);
                    ELSIF turns % 16 = 0 THEN
                        may_spin := pg_try_advisory_lock(tbl_repl._lock_spin(), 1);
                        IF may_spin THEN
                            PERFORM pg_advisory_unlock(tbl_repl._lock_spin(), 1);
                        ELSE
                            PERFORM pg_advisory_unlock(tbl_repl._lock_spin(), 0);
                        END IF;
                    END IF;
                    turns := turns + 1;
                    previous := turn;
                END LOOP;
                IF may_spin THEN
                    PERFORM pg_advisory_unlock(tbl_repl._lock_spin(), 0);
                    may_spin := false;
                    IF longest > 0 THEN
                        PERFORM set_config('tbl_repl.spins_in_vain', '0/0', false);
                    END IF;
                END IF;
                EXIT;
            EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
                IF may_spin THEN
                    PERFORM pg_advisory_unlock(tbl_repl._lock_spin(), 0);
                END IF;
                IF SQLSTATE <> '57014' THEN
                    RAISE;
                END IF;
                canceled := true;
                turns := turns + 1;  -- nobody spins after that
                EXIT WHEN harmless;
            END;
        END LOOP;
        IF canceled AND harmless THEN
            PERFORM tbl_repl._dblink_disconnect(conn);
            EXIT;
        END IF;
        IF turn > deadline AND tbl_repl._dblink_is_busy(conn) = 1 THEN
            PERFORM tbl_repl._dblink_disconnect(conn);
            RAISE EXCEPTION USING
                ERRCODE = 'connection_failure',
                MESSAGE = 'the target did not answer in time',
                HINT    = 'The target is down, hung or out of reach; timeout of the target says how long is waited.';
        END IF;
        BEGIN
            SELECT r INTO line FROM tbl_repl._dblink_result(conn) AS r;
        EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
            GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE;
            IF code ~ '^(08|57P)' THEN
                PERFORM tbl_repl._dblink_disconnect(conn);
            ELSIF tbl_repl._is_lease_over(code, SQLERRM) THEN
                PERFORM tbl_repl._dblink_disconnect(conn);
                RAISE EXCEPTION USING
                    ERRCODE = 'connection_exception',
                    MESSAGE = 'the target has got the message too late',
                    DETAIL  = 'By its clock the time was over, as measured when the connection was opened.',
                    HINT    = 'The target is busy or far away, or its clock, or the one here, has been set.';
            ELSE
                PERFORM tbl_repl._read_on(conn, deadline);
            END IF;
            RAISE;
        END;
        EXIT WHEN NOT FOUND;
        answer := line;
    END LOOP;
    IF canceled AND NOT at_commit THEN
        RAISE EXCEPTION USING
            ERRCODE = 'query_canceled',
            MESSAGE = 'canceling statement due to user request';
    END IF;
    RETURN answer;
END
$function$;
COMMENT ON FUNCTION tbl_repl._receive(text, timestamptz, boolean, boolean) IS
    'waits for the answer to the message sent last, until the deadline';

-- After an error the rest of the answer has to be read, or the connection stays busy.
CREATE OR REPLACE FUNCTION tbl_repl._read_on(conn text, deadline timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    LOOP
        WHILE tbl_repl._dblink_is_busy(conn) = 1 AND clock_timestamp() < deadline LOOP
            PERFORM pg_sleep(0.0005);
        END LOOP;
        IF tbl_repl._dblink_is_busy(conn) = 1 THEN
            PERFORM tbl_repl._dblink_disconnect(conn);
            RETURN;
        END IF;
        BEGIN
            PERFORM FROM tbl_repl._dblink_result(conn) AS r;
            EXIT WHEN NOT FOUND;
        EXCEPTION
            WHEN in_failed_sql_transaction THEN
                NULL;  -- an open remote transaction: the caller rolls back
            WHEN assert_failure OR OTHERS THEN
                PERFORM tbl_repl._dblink_disconnect(conn);
                RETURN;
        END;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._read_on(text, timestamptz) IS
    'reads what is left of an answer after an error, or closes the connection';

CREATE OR REPLACE FUNCTION tbl_repl._call(
    conn      text,
    message   text,
    deadline  timestamptz,
    at_commit boolean DEFAULT false
)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    PERFORM tbl_repl._send(conn, message);
    RETURN tbl_repl._receive(conn, deadline, at_commit);
END
$function$;
COMMENT ON FUNCTION tbl_repl._call(text, text, timestamptz, boolean) IS
    'sends a message and waits for its answer';

-- Known dead, or an answer left that nobody read: not to be used again.
CREATE OR REPLACE FUNCTION tbl_repl._is_usable(conn text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF NOT coalesce(conn = ANY (tbl_repl._dblink_connections()), false) THEN
        RETURN false;
    ELSIF tbl_repl._dblink_is_busy(conn) = 0 AND tbl_repl._dblink_error(conn) = 'OK' THEN
        RETURN true;
    END IF;
    PERFORM tbl_repl._dblink_disconnect(conn);
    RETURN false;
END
$function$;
COMMENT ON FUNCTION tbl_repl._is_usable(text) IS
    'whether a named connection is open and idle; a dead one is closed';

-- A peer that has gone may not have told us yet: where trying again is not free, ask first.
CREATE OR REPLACE FUNCTION tbl_repl._is_alive(conn text, deadline timestamptz)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF NOT tbl_repl._is_usable(conn) THEN
        RETURN false;
    END IF;
    PERFORM tbl_repl._call(conn, 'SELECT 1', deadline);
    RETURN true;
EXCEPTION WHEN assert_failure OR OTHERS THEN
    IF conn = ANY (tbl_repl._dblink_connections()) THEN
        PERFORM tbl_repl._dblink_disconnect(conn);
    END IF;
    RETURN false;
END
$function$;
COMMENT ON FUNCTION tbl_repl._is_alive(text, timestamptz) IS
    'whether a named connection answers; one that does not is closed';

CREATE OR REPLACE FUNCTION tbl_repl._connection_name(server name, owner name, timeout interval)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RETURN (
        SELECT format('tbl_repl_%s_%s_%s_%s', s.oid, to_regrole(quote_ident(owner))::oid, ceil(extract(epoch FROM timeout) * 1000), s.xmin)
        FROM pg_foreign_server AS s WHERE s.srvname = server);
END
$function$;
COMMENT ON FUNCTION tbl_repl._connection_name(name, name, interval) IS
    'name of the dblink connection: server, owner, timeout in ms, version of the server''s definition';

-- A message that commits ends with its lease: too late on the target's clock, it undoes itself.
CREATE OR REPLACE FUNCTION tbl_repl._lease(deadline timestamptz) RETURNS text
LANGUAGE sql STABLE
RETURN format('; EXECUTE tbl_repl_lease(%s)', extract(epoch FROM deadline)::numeric);
COMMENT ON FUNCTION tbl_repl._lease(timestamptz) IS 'statement that fails on the target after the deadline';

-- _connect(target_id, conn, deadline, sent_until): a usable connection, opened and prepared if need be.
CREATE OR REPLACE FUNCTION tbl_repl._connect(
    target_id  integer,
    conn       text,
    deadline   timestamptz,
    sent_until timestamptz DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    statement text;
    half_time timestamptz := clock_timestamp() + (deadline - clock_timestamp()) / 2;
BEGIN
    IF tbl_repl._is_usable(conn) THEN
        RETURN;
    END IF;
    -- what no definition needs any more, after another timeout was given
    PERFORM tbl_repl._dblink_disconnect(c)
    FROM unnest(tbl_repl._dblink_connections()) AS c
    WHERE c ~ '^tbl_repl(_[0-9]+){4}$' AND tbl_repl._dblink_is_busy(c) = 0
      AND NOT EXISTS (SELECT FROM tbl_repl.target AS t WHERE tbl_repl._connection_name(t.server, t.owner, t.timeout) = c);
    EXECUTE format('SELECT tbl_repl.connect_%s($1, $2, $3)', target_id) USING conn, deadline, sent_until;
    -- What is not prepared here is when it is needed.  Nobody waits for long for a table that is locked there: it may be another
    -- one's, and be paused for that.
    FOR statement IN
        SELECT format('SET LOCAL lock_timeout = %s; %s', ceil(extract(epoch FROM o.timeout) * 100), tbl_repl._prepare_sql(o))
        FROM tbl_repl.target AS t
        JOIN tbl_repl.target AS o ON o.server = t.server AND o.owner = t.owner AND o.timeout = t.timeout
                                 AND o.mode <> 'async'
        JOIN tbl_repl.target_state AS st ON st.target_id = o.target_id AND (st.status = 'ok' OR o.target_id = t.target_id)
        WHERE t.target_id = _connect.target_id
        ORDER BY o.target_id <> t.target_id, o.target_id
    LOOP
        EXIT WHEN clock_timestamp() > half_time;
        BEGIN
            PERFORM tbl_repl._call(conn, statement, deadline);
        EXCEPTION WHEN assert_failure OR OTHERS THEN
            -- One broken target must not close the way to the others: it fails when it is shipped to.
            IF SQLSTATE ~ '^(08|57P)' THEN
                RAISE;
            END IF;
        END;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._connect(integer, text, timestamptz, timestamptz) IS
    'makes sure that a connection to a target is open';

-- A connection that died while it was idle is often found out only when it is used.  What is sent in several
-- messages cannot simply be sent again, so it asks first.
CREATE OR REPLACE FUNCTION tbl_repl._connect_alive(target_id integer, conn text, deadline timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    PERFORM tbl_repl._connect(target_id, conn, deadline);
    BEGIN
        PERFORM tbl_repl._call(conn, 'SELECT 1', deadline);
    EXCEPTION WHEN assert_failure OR OTHERS THEN
        IF SQLSTATE !~ '^(08|57P)' OR clock_timestamp() > deadline THEN
            RAISE;
        END IF;
        IF conn = ANY (tbl_repl._dblink_connections()) THEN
            PERFORM tbl_repl._dblink_disconnect(conn);
        END IF;
        PERFORM tbl_repl._connect(target_id, conn, deadline);
    END;
END
$function$;
COMMENT ON FUNCTION tbl_repl._connect_alive(integer, text, timestamptz) IS
    'makes sure that a connection to a target is open and answers';
