-- Ship: what happens at the commit of a transaction that has changed tables with direct targets.
--
-- Promises: a sync target has what is committed, or nothing is committed; a tolerant one has it, or it
-- is queued; one message a target and one round trip for all of them, as long as a transaction touches
-- few rows; nobody is waited for longer than timeout.
--
-- Why it is right.  Two transactions that write the same row are serialised by its row lock, and shipping
-- happens while it is held: among direct shippers the state committed last is the state shipped last.
-- A drainer (replay.sql) works alone: it holds the lock ship exclusively, which waits for shippers in
-- flight and turns new ones away, and reads what is committed after it got the lock.  Status is a hint;
-- the pending rows of the queue are the truth.

-- The deferred trigger of tbl_repl.flush.
-- It has to run after every other deferred check, or a commit would be shipped that still fails.
-- Deferred events fire in rounds, and an event queued in a round comes in the next one: so a firing that may not
-- be the last one only queues the next (column hop, whose update fires).  When nobody but us has written anything
-- from one firing to the next, no event can have been queued, and none is left.  That is told by the numbers of
-- commands: each command that writes takes the next one, and a row version carries its own (cmin).  Two
-- of these tools waiting for each other must end: hence the bound.
-- SET CONSTRAINTS ALL IMMEDIATE by the application makes our events fire at once, inside the statement
-- that queues them: then we are nested, and not at commit.  Our own constraint is set back.
-- A cancel must not undo here what a target has got: wherever it comes, everything is shipped once more; a message that
-- is still on its way is ended first, with its connection (see _open).  Not so one that comes before anything is
-- sent (_may_ship) or, of many rows, committed there; nor what a sync target says was cancelled.
-- No sequential scans: plans are made while stash and flush are small, and these two grow between two vacuums.
CREATE OR REPLACE FUNCTION tbl_repl._flush()
RETURNS trigger
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $function$
DECLARE
    quiet   boolean := false;
    tries   integer := 0;
    context text;
BEGIN
    IF pg_trigger_depth() > 1 THEN
        SET CONSTRAINTS tbl_repl.flush_at_commit DEFERRED;
        UPDATE tbl_repl.flush AS f SET hop = 0 WHERE f.txid = NEW.txid;
        RETURN NULL;
    END IF;
    IF NEW.hop > 0 THEN
        UPDATE tbl_repl.flush AS f SET written = f.cmin::text::integer WHERE f.txid = NEW.txid
        RETURNING f.cmin::text::integer = f.written + 1 OR f.hop > 100 INTO quiet;
    END IF;
    IF NOT quiet THEN
        UPDATE tbl_repl.flush AS f SET hop = NEW.hop + 1 WHERE f.txid = NEW.txid;
        RETURN NULL;
    END IF;
    LOOP
        BEGIN
            IF NEW.key IS NULL OR current_setting('transaction_isolation') <> 'read committed' OR NOT tbl_repl._ship_quickly(NEW) THEN
                DELETE FROM tbl_repl.flush AS f WHERE f.txid = NEW.txid;
                PERFORM tbl_repl._unpack(NEW);
                PERFORM tbl_repl._ship_transaction(NEW.txid);
                DELETE FROM tbl_repl.stash AS s WHERE s.txid = NEW.txid;
            END IF;
            RETURN NULL;  -- in here: behind the block a cancel could still come
        EXCEPTION WHEN query_canceled THEN
            GET STACKED DIAGNOSTICS context = PG_EXCEPTION_CONTEXT;
            tries := tries + 1;
            IF tries > 5 OR context ~ '_(raise_lane|may_ship|ship_large)[(]' THEN
                RAISE;
            END IF;
        END;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._flush() IS
    'at commit: ships what the transaction has changed; SECURITY DEFINER, for writers have no right here';

CREATE CONSTRAINT TRIGGER flush_at_commit
    AFTER INSERT OR UPDATE OF hop ON tbl_repl.flush
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION tbl_repl._flush();
-- what has been captured is shipped, also where session_replication_role has been set to replica meanwhile
ALTER TABLE tbl_repl.flush ENABLE ALWAYS TRIGGER flush_at_commit;

-- Only the text of the command tells that this commit is a PREPARE TRANSACTION.  There is none (NULL) where
-- the extended protocol commits by itself.
CREATE OR REPLACE FUNCTION tbl_repl._is_preparing()
RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RETURN coalesce(current_query() ~* E'prepare\\s+transaction'
       AND regexp_replace(regexp_replace(current_query(), E'''[^'']*''|/\\*.*?\\*/|--[^\\n]*', ' ', 'g'), E'\\s+', ' ', 'g')
           ~* E'(^|;)\\s*prepare transaction', false);
END
$function$;
COMMENT ON FUNCTION tbl_repl._is_preparing() IS 'whether the command in progress is PREPARE TRANSACTION';

-- _render_transaction(target_id, own, mine, form): the keys that transaction own has changed in the
-- target's source, rendered.  NULL, NULL, 0 where its operations leave nothing.
CREATE OR REPLACE FUNCTION tbl_repl._render_transaction(
    target_id integer,
    own       xid8,
    mine      boolean,
    form      text,
    OUT deletes text,
    OUT upserts text,
    OUT rows    integer
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target  record;
    item    record;
    written text[];
    removed text[];
    more    record;
BEGIN
    SELECT t.source_id, t.operations, t.operations @> '{insert,update,delete,truncate}' AS everything
    INTO target
    FROM tbl_repl.target AS t WHERE t.target_id = _render_transaction.target_id;
    FOR item IN SELECT s.op, s.keys FROM tbl_repl.stash AS s
                WHERE s.txid = own AND s.source_id = target.source_id AND s.keys IS NOT NULL AND s.op <> 'N'
    LOOP
        IF target.everything OR (item.op = 'I' AND 'insert' = ANY (target.operations))
                             OR (item.op = 'U' AND 'update' = ANY (target.operations)) THEN
            written := CASE WHEN written IS NULL THEN item.keys ELSE written || item.keys END;
        ELSIF (item.op = 'K' AND 'update' = ANY (target.operations)) OR (item.op = 'D' AND 'delete' = ANY (target.operations))
           OR (item.op = 'T' AND 'truncate' = ANY (target.operations)) THEN
            removed := CASE WHEN removed IS NULL THEN item.keys ELSE removed || item.keys END;
        END IF;
    END LOOP;
    rows := 0;
    IF written IS NOT NULL THEN
        IF cardinality(written) > 1 THEN
            SELECT array_agg(DISTINCT k) INTO written FROM unnest(written) AS k;
        END IF;
        EXECUTE format('SELECT * FROM tbl_repl.render_%s($1, $2, $3, $4)', target_id)
        INTO deletes, upserts, rows
        USING written, mine, target.everything OR 'delete' = ANY (target.operations), form;
    END IF;
    IF removed IS NOT NULL THEN
        SELECT array_agg(DISTINCT k) INTO removed FROM unnest(removed) AS k;
        EXECUTE format('SELECT * FROM tbl_repl.render_%s($1, $2, $3, $4)', target_id)
        INTO more USING removed, mine, true, form;
        deletes := concat_ws('; ', deletes, more.deletes);
        upserts := concat_ws('; ', upserts, more.upserts);
        rows := rows + more.rows;
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._render_transaction(integer, xid8, boolean, text) IS
    'what a transaction in flight has changed, as SQL for one target';

CREATE OR REPLACE FUNCTION tbl_repl._sent_sql(target_id integer, own xid8, mine boolean)
RETURNS text
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT nullif(concat_ws('; ', r.deletes, r.upserts), '') FROM tbl_repl._render_transaction(target_id, own, mine, 'plain') AS r
$function$;
COMMENT ON FUNCTION tbl_repl._sent_sql(integer, xid8, boolean) IS
    'what a transaction in flight has changed, for people: without names of prepared statements';

-- _message(parcels, upserts_first): deletions from the referencing tables upwards, then rows from the
-- referenced tables downwards.
CREATE OR REPLACE FUNCTION tbl_repl._message(parcels tbl_repl.parcel[], upserts_first boolean)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN upserts_first
                THEN concat_ws('; ', string_agg(p.upserts, '; ' ORDER BY p.fk_rank, p.target_id),
                                     string_agg(p.deletes, '; ' ORDER BY p.fk_rank DESC, p.target_id))
                ELSE concat_ws('; ', string_agg(p.deletes, '; ' ORDER BY p.fk_rank DESC, p.target_id),
                                     string_agg(p.upserts, '; ' ORDER BY p.fk_rank, p.target_id)) END
    FROM unnest(parcels) AS p
$function$;
COMMENT ON FUNCTION tbl_repl._message(tbl_repl.parcel[], boolean) IS
    'the statements for one connection, in an order that foreign keys allow';

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

-- _ship_transaction(own): routes, ships, queues what could not be shipped.  SQLSTATE of a failed sync
-- target is the remote one.  Takes ship (shared) of each target it ships to, then queue (shared) of each
-- it queues for, all to the end of the transaction.
-- Nothing is planned anew at every commit; jit: where a sequential scan cannot be helped it looks very dear.
CREATE OR REPLACE FUNCTION tbl_repl._ship_transaction(own xid8)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET jit = off
AS $function$
DECLARE
    repeatable boolean := current_setting('transaction_isolation') <> 'read committed';
    preparing  boolean := false;
    total      bigint;
    whole      boolean;
    waking     boolean;
    noting     boolean;
    changed    integer[];
    copied     integer[];
    item       record;
    parcels    tbl_repl.parcel[] := '{}';
    failed     integer[] := '{}';
    queued     integer[] := '{}';
BEGIN
    SELECT sum(s.row_count), bool_or(s.keys IS NULL AND s.op <> 'W'), bool_or(s.op = 'W'), bool_or(s.op = 'N'),
           array_agg(s.source_id) FILTER (WHERE s.op NOT IN ('C', 'W', 'N')), array_agg(s.target_id) FILTER (WHERE s.op = 'C')
    INTO total, whole, waking, noting, changed, copied
    FROM tbl_repl.stash AS s WHERE s.txid = own;
    IF total IS NULL THEN
        RETURN;
    END IF;
    IF noting THEN
        PERFORM tbl_repl._note_carried(own);
    END IF;
    preparing := tbl_repl._is_preparing();
    IF waking AND NOT preparing THEN
        NOTIFY tbl_repl;
    END IF;
    IF total = 0 THEN
        RETURN;
    END IF;

    FOR item IN
        SELECT t.target_id, t.source_id, t.server, t.mode, t.timeout, s.source_table, s.fk_rank, st.status,
               coalesce(t.target_id = ANY (copied), false) AS copies, t.owner
        FROM tbl_repl.target AS t
        JOIN tbl_repl.target_state AS st USING (target_id)
        JOIN tbl_repl.source AS s USING (source_id)
        -- not one that this transaction has dropped
        JOIN pg_class AS c ON c.oid = s.source_table
        WHERE (t.source_id = ANY (changed) AND t.mode <> 'async'
               -- what else there is has been queued by capture
               AND (t.mode = 'sync' OR current_setting('transaction_isolation') <> 'serializable')) OR t.target_id = ANY (copied)
        ORDER BY t.target_id
    LOOP
        IF preparing AND (item.copies OR (item.mode = 'sync' AND item.status = 'ok')) THEN
            RAISE EXCEPTION USING
                ERRCODE = 'feature_not_supported',
                MESSAGE = format('cannot PREPARE a transaction that has written table %s, which has a sync target, or has added a target to it',
                                 item.source_table),
                HINT    = 'Commit it in one phase, or make the target tolerant or async.';
        ELSIF NOT preparing AND tbl_repl._may_ship(item.target_id, item.status, item.mode, item.timeout, repeatable) THEN
            parcels := array_append(parcels, ROW(item.target_id, item.source_id, item.server,
                tbl_repl._connection_name(item.server, item.owner, item.timeout),
                item.mode = 'sync' OR item.copies, item.timeout, item.fk_rank, NULL, NULL, 0)::tbl_repl.parcel);
        ELSE
            queued := array_append(queued, item.target_id);
        END IF;
    END LOOP;

    IF cardinality(parcels) > 0 THEN
        failed := CASE WHEN whole OR total > tbl_repl._rows_per_message() THEN tbl_repl._ship_large(parcels, own, repeatable)
                       ELSE tbl_repl._ship_small(parcels, own, repeatable) END;
    END IF;
    IF cardinality(queued) > 0 OR cardinality(failed) > 0 THEN
        PERFORM tbl_repl._queue_for(own, queued, failed);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._ship_transaction(xid8) IS
    'ships what a transaction has changed to its direct targets, or queues it';

-- _queue_for(own, queued, failed): the second pass of a commit: queues what the transaction has changed for the targets
-- that were turned away (queued), and for those that have failed.
CREATE OR REPLACE FUNCTION tbl_repl._queue_for(own xid8, queued integer[], failed integer[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    repeatable boolean := current_setting('transaction_isolation') <> 'read committed';
    preparing  boolean := tbl_repl._is_preparing();
    entered    boolean;
    total      bigint;
    whole      boolean;
    item       record;
    parcels    tbl_repl.parcel[];
BEGIN
    SELECT sum(s.row_count), bool_or(s.keys IS NULL AND s.op <> 'W') INTO total, whole FROM tbl_repl.stash AS s WHERE s.txid = own;
    -- Second pass.  With queue held nobody can set a target back to ok until we have committed; so one
    -- that has become ok meanwhile has to be shipped to after all, or its rows would wait behind nothing.
    FOR item IN SELECT q.target_id, q.target_id = ANY (failed) AS has_failed
                FROM (SELECT unnest(queued) UNION SELECT unnest(failed)) AS q (target_id) ORDER BY 1
    LOOP
        entered := tbl_repl._enter_queue(item.target_id);
        IF entered AND NOT item.has_failed AND NOT preparing AND NOT repeatable
           AND tbl_repl._is_ok(item.target_id) AND tbl_repl._may_ship(item.target_id, 'ok', 'tolerant', NULL, false)
        THEN
            SELECT array_agg(ROW(t.target_id, t.source_id, t.server, tbl_repl._connection_name(t.server, t.owner, t.timeout),
                                 t.mode = 'sync', t.timeout, s.fk_rank, NULL, NULL, 0)::tbl_repl.parcel) INTO parcels
            FROM tbl_repl.target AS t JOIN tbl_repl.source AS s USING (source_id) WHERE t.target_id = item.target_id;
            failed := CASE WHEN whole OR total > tbl_repl._rows_per_message()
                           THEN tbl_repl._ship_large(parcels, own, repeatable)
                           ELSE tbl_repl._ship_small(parcels, own, repeatable) END;
            CONTINUE WHEN cardinality(failed) = 0;
            item.has_failed := true;
        END IF;
        INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count, olds)
        SELECT h.segment, c.source_id, item.target_id, c.op, c.keys, c.row_count, c.olds
        FROM tbl_repl.stash AS c
        JOIN tbl_repl.target AS t ON t.source_id = c.source_id AND t.target_id = item.target_id
        CROSS JOIN tbl_repl.queue_head AS h
        WHERE c.txid = own AND c.op NOT IN ('C', 'W', 'N')
        ORDER BY c.first DESC, c.ctid;
        IF item.has_failed THEN
            PERFORM tbl_repl._set_queueing(item.target_id);
        END IF;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._queue_for(xid8, integer[], integer[]) IS
    'queues what a transaction has changed for targets that it could not ship to';

-- Takes queue (shared).  Only a drainer that sets the status holds it against us, to its commit.  The
-- application's lock_timeout and a cancel must not fail its commit for that, nor may it wait for long: who does
-- not get the lock queues all the same, as under SERIALIZABLE.
CREATE OR REPLACE FUNCTION tbl_repl._enter_queue(target_id integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    give_up timestamptz := clock_timestamp() + (SELECT t.timeout FROM tbl_repl.target AS t WHERE t.target_id = _enter_queue.target_id);
BEGIN
    WHILE NOT pg_try_advisory_xact_lock_shared(tbl_repl._lock_queue(), target_id) LOOP
        IF clock_timestamp() > give_up THEN
            RETURN false;
        END IF;
        PERFORM pg_sleep(0.001);
    END LOOP;
    RETURN true;
EXCEPTION WHEN query_canceled THEN
    RETURN false;
END
$function$;
COMMENT ON FUNCTION tbl_repl._enter_queue(integer) IS
    'takes the lock queue for a writer that is going to queue; whether it got it';

-- _ship_quickly(change): the usual case, one row of a table with one direct target, in READ COMMITTED.  No lists,
-- nothing looked up twice, and what has to be written here is written while the target works; the rules are those of
-- _ship_transaction.  False: it is another case, or anything was unusual before the message was sent; nothing has
-- happened then.  Raises what a sync target says.
CREATE OR REPLACE FUNCTION tbl_repl._ship_quickly(change tbl_repl.flush)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $function$
DECLARE
    item         record;
    message      text;
    receipt      text;
    deadline     timestamptz;
    lane         tbl_repl.lane;
    sending      boolean := false;
    error_text   text;
    error_detail text;
    error_hint   text;
    context      text;
BEGIN
    SELECT t.source_id, t.server, t.timeout, t.mode = 'sync' AS sync, t.receipts,
           format('tbl_repl_%s_%s_%s_%s', f.oid, to_regrole(quote_ident(t.owner))::oid, ceil(extract(epoch FROM t.timeout) * 1000), f.xmin) AS conn
    INTO item
    FROM tbl_repl.target AS t
    JOIN tbl_repl.target_state AS st ON st.target_id = t.target_id AND st.status = 'ok'
    JOIN pg_foreign_server AS f ON f.srvname = t.server
    WHERE t.target_id = change.target_id AND t.mode <> 'async'
      AND NOT EXISTS (SELECT FROM tbl_repl.stash AS s WHERE s.txid = change.txid);
    -- Once ship is held nothing but the sending may follow: who has more to ship takes it in order.  And the status is looked at
    -- once more, for who has held it may have changed that.
    IF NOT FOUND OR tbl_repl._is_preparing()
       OR NOT coalesce(item.conn = ANY (tbl_repl._dblink_connections()), false)
       OR NOT pg_try_advisory_xact_lock_shared(tbl_repl._lock_ship(), change.target_id)
       OR NOT tbl_repl._is_ok(change.target_id)
    THEN
        RETURN false;
    END IF;
    BEGIN
        deadline := clock_timestamp() + item.timeout;
        EXECUTE format('SELECT tbl_repl.row_%s($1, $2)', change.target_id)
        INTO message USING change.key, extract(epoch FROM deadline);
        receipt := CASE WHEN item.receipts THEN tbl_repl._receipt(change.target_id, 0, ARRAY[change.key], deadline) ELSE '' END;
        IF tbl_repl._dblink_is_busy(item.conn) <> 0 OR tbl_repl._dblink_error(item.conn) <> 'OK' THEN
            RETURN false;
        END IF;
        sending := true;
        IF tbl_repl._dblink_send(item.conn, message || receipt) <> 1 THEN
            RETURN false;
        END IF;
    EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
        -- a cancel right behind the sending: below, whoever waits for the answer finds out
        IF NOT sending THEN
            RETURN false;
        END IF;
    END;
    DELETE FROM tbl_repl.flush AS f WHERE f.txid = change.txid;
    PERFORM tbl_repl._count_shipped(change.target_id, 1);
    BEGIN
        IF tbl_repl._receive(item.conn, deadline, true) IS NULL THEN
            RAISE EXCEPTION USING
                ERRCODE = 'connection_failure',
                MESSAGE = 'the target has got no message';
        END IF;
        RETURN true;
    EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
        GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT,
            context = PG_EXCEPTION_CONTEXT;
        SELECT item.conn, change.target_id, item.sync, deadline, 'sent',
               ARRAY[ROW(change.target_id, item.source_id, item.server, item.conn, item.sync, item.timeout, s.fk_rank, NULL, message, 1)::tbl_repl.parcel],
               message, NULL, NULL, NULL, NULL, NULL
        INTO lane
        FROM tbl_repl.source AS s WHERE s.source_id = item.source_id;
        -- cancelled here: the answer is still to come
        IF SQLSTATE <> '57014' OR tbl_repl._is_too_slow(SQLSTATE, context, item.conn) THEN
            lane := tbl_repl._lane_failed(lane, SQLSTATE, error_text, error_detail, error_hint);
            lane.state := 'refused';
        END IF;
    END;
    PERFORM tbl_repl._unpack(change);
    lane := tbl_repl._lane_finish(lane, change.txid, false, false);
    IF lane.state <> 'done' THEN
        IF item.sync THEN
            PERFORM tbl_repl._raise_lane(lane);
        END IF;
        PERFORM tbl_repl._count_shipped(change.target_id, -1);
        PERFORM tbl_repl._log_error(change.target_id, NULL, lane.code, lane.error, lane.detail, lane.hint, tbl_repl._sent_sql(change.target_id, change.txid, false));
        PERFORM tbl_repl._queue_for(change.txid, '{}', ARRAY[change.target_id]);
    ELSE
        PERFORM tbl_repl._count_shipped(change.target_id, 0);  -- another receipt
    END IF;
    DELETE FROM tbl_repl.stash AS s WHERE s.txid = change.txid;
    RETURN true;
END
$function$;
COMMENT ON FUNCTION tbl_repl._ship_quickly(tbl_repl.flush) IS
    'ships a single row to its only direct target, if there is nothing unusual about it';

-- A change that cannot be shipped quickly is one of several.
CREATE OR REPLACE FUNCTION tbl_repl._unpack(change tbl_repl.flush)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    INSERT INTO tbl_repl.stash (source_id, op, keys, row_count, first)
    SELECT t.source_id, change.op, ARRAY[change.key], 1, true
    FROM tbl_repl.target AS t WHERE t.target_id = change.target_id AND change.key IS NOT NULL
$function$;
COMMENT ON FUNCTION tbl_repl._unpack(tbl_repl.flush) IS 'puts the change that was kept in flush into the stash';

CREATE OR REPLACE FUNCTION tbl_repl._rows_per_message() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1000;
COMMENT ON FUNCTION tbl_repl._rows_per_message() IS 'how many rows one message carries at the most';

-- May this transaction ship to the target directly?  Takes ship (shared) if so.
-- A REPEATABLE READ writer sees status and definition of its snapshot: FOR SHARE fails (40001) when they have changed
-- since, and holds them from then on.  Others look once more when they have got ship: who has held it may have paused the
-- target, or begun to copy it.  A sync writer that finds a drainer at work while the status is ok waits for it, bounded.
CREATE OR REPLACE FUNCTION tbl_repl._may_ship(
    target_id  integer,
    status     text,
    mode       text,
    timeout    interval,
    repeatable boolean
)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    deadline timestamptz;
BEGIN
    IF status <> 'ok' THEN
        RETURN false;
    END IF;
    IF repeatable THEN
        BEGIN
            PERFORM FROM tbl_repl.target_state AS st JOIN tbl_repl.target AS t USING (target_id) WHERE st.target_id = _may_ship.target_id FOR SHARE;
        EXCEPTION WHEN serialization_failure THEN
            RETURN false;
        END;
    END IF;
    IF NOT pg_try_advisory_xact_lock_shared(tbl_repl._lock_ship(), target_id) THEN
        IF mode <> 'sync' THEN
            RETURN false;
        END IF;
        deadline := clock_timestamp() + timeout;
        LOOP
            PERFORM pg_sleep(0.001);
            EXIT WHEN pg_try_advisory_xact_lock_shared(tbl_repl._lock_ship(), target_id);
            IF NOT repeatable AND NOT tbl_repl._is_ok(target_id) THEN
                RETURN false;
            ELSIF clock_timestamp() > deadline THEN
                RAISE EXCEPTION USING
                    ERRCODE = 'lock_not_available',
                    MESSAGE = format('sync target %s is busy', target_id),
                    DETAIL  = 'A replay of its queue holds it.',
                    HINT    = 'Try again, or give the target a longer timeout.';
            END IF;
        END LOOP;
    END IF;
    RETURN repeatable OR tbl_repl._is_ok(target_id);
END
$function$;
COMMENT ON FUNCTION tbl_repl._may_ship(integer, text, text, interval, boolean) IS
    'whether a writer may ship to a target directly; takes the lock ship if so';

CREATE OR REPLACE FUNCTION tbl_repl._is_ok(target_id integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RETURN (SELECT st.status = 'ok' FROM tbl_repl.target_state AS st WHERE st.target_id = _is_ok.target_id);
END
$function$;
COMMENT ON FUNCTION tbl_repl._is_ok(integer) IS 'whether the status of a target is ok now: VOLATILE, for a new snapshot';

-- SKIP LOCKED: who holds the row is setting it as well, or has just brought the target back.
CREATE OR REPLACE FUNCTION tbl_repl._set_queueing(target_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    UPDATE tbl_repl.target_state AS st SET status = 'queueing'
    WHERE st.target_id IN (SELECT l.target_id FROM tbl_repl.target_state AS l
                           WHERE l.target_id = _set_queueing.target_id AND l.status = 'ok' FOR UPDATE SKIP LOCKED);
EXCEPTION WHEN serialization_failure THEN
    NULL;  -- under REPEATABLE READ: changed since our snapshot; the rows we queued are pending all the same
END
$function$;
COMMENT ON FUNCTION tbl_repl._set_queueing(integer) IS
    'a target failed: from now on its changes queue';

CREATE OR REPLACE FUNCTION tbl_repl._log_error(
    target_id integer,
    key       text,
    code      text,
    message   text,
    detail    text,
    hint      text,
    statement text
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    -- who is not let in is told so in the detail only
    why text := CASE WHEN code ~ '^08' THEN nullif(btrim(regexp_replace(detail, E'\\s+', ' ', 'g')), '') END;
BEGIN
    INSERT INTO tbl_repl.error (target_id, key, sqlstate, message, detail, hint, statement)
    VALUES (target_id, key, code, message, nullif(detail, ''), nullif(hint, ''), left(statement, 10000));
    -- One call in sixteen clears up, for it looks at a thousand rows: by the clock, for random() is the application's.
    IF extract(microseconds FROM clock_timestamp())::integer % 16 = 0 THEN
        PERFORM tbl_repl._trim_errors(target_id);
    END IF;
    BEGIN
        UPDATE tbl_repl.target_state AS st SET last_error = format('%s: %s', code, concat_ws(': ', message, why)), last_error_at = clock_timestamp()
        WHERE st.target_id IN (SELECT l.target_id FROM tbl_repl.target_state AS l
                               WHERE l.target_id = _log_error.target_id FOR UPDATE SKIP LOCKED);
    EXCEPTION WHEN serialization_failure THEN
        NULL;
    END;
END
$function$;
COMMENT ON FUNCTION tbl_repl._log_error(integer, text, text, text, text, text, text) IS
    'keeps an error of a target for error_log and target_status';

-- SKIP LOCKED: who fails beside us clears up the same rows, to its commit.
CREATE OR REPLACE FUNCTION tbl_repl._trim_errors(target_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    DELETE FROM tbl_repl.error AS e
    WHERE e.ctid = ANY (ARRAY(SELECT x.ctid FROM tbl_repl.error AS x WHERE x.target_id = _trim_errors.target_id
                              ORDER BY x.at DESC OFFSET 1000 FOR UPDATE SKIP LOCKED));
EXCEPTION WHEN serialization_failure THEN
    NULL;  -- under REPEATABLE READ: others have cleared up since our snapshot
END
$function$;
COMMENT ON FUNCTION tbl_repl._trim_errors(integer) IS 'forgets all but the newest thousand errors of a target';

-- receipts: how many it has left, so that the session's next transaction knows what to take over.
CREATE OR REPLACE FUNCTION tbl_repl._count_shipped(target_id integer, rows bigint, receipts integer DEFAULT 1)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    UPDATE tbl_repl.shipped AS s
    SET rows = s.rows + _count_shipped.rows, shipped_at = clock_timestamp(), txid = pg_current_xact_id(),
        commits = s.commits + (current_setting('transaction_isolation') <> 'serializable')::integer,
        receipts = _count_shipped.receipts + CASE WHEN s.txid = pg_current_xact_id() THEN s.receipts ELSE 0 END
    WHERE s.ctid = (SELECT x.ctid FROM tbl_repl.shipped AS x
                    WHERE x.target_id = _count_shipped.target_id AND x.pid = pg_backend_pid() ORDER BY x.turn DESC LIMIT 1);
    IF NOT FOUND THEN
        INSERT INTO tbl_repl.shipped (target_id, pid, rows, shipped_at, txid, receipts)
        VALUES (target_id, pg_backend_pid(), rows, clock_timestamp(), pg_current_xact_id(), receipts) ON CONFLICT DO NOTHING;
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._count_shipped(integer, bigint, integer) IS 'counts rows shipped at commit by this backend';

-- What backends have counted that have ended goes into one row a target, that of pid 0.  By replay, now and then: who
-- commits must not wait for somebody who drops a target, and may have looked at pg_stat_activity before, which would not
-- show him who has come since.  One at a time; rows that others hold are left for the next time.
CREATE OR REPLACE FUNCTION tbl_repl._sum_up_shipped()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    free integer[];
BEGIN
    IF NOT pg_try_advisory_xact_lock(tbl_repl._lock_figures(), 0) THEN
        RETURN;
    END IF;
    free := ARRAY(SELECT s.target_id FROM tbl_repl.shipped AS s WHERE s.pid = 0 FOR UPDATE SKIP LOCKED);
    WITH gone AS (
        DELETE FROM tbl_repl.shipped AS s
        WHERE s.ctid = ANY (ARRAY(
            SELECT x.ctid FROM tbl_repl.shipped AS x
            WHERE x.pid <> 0 AND x.pid NOT IN (SELECT a.pid FROM pg_stat_activity AS a)
              AND (x.target_id = ANY (free) OR NOT EXISTS (SELECT FROM tbl_repl.shipped AS z WHERE z.target_id = x.target_id AND z.pid = 0))
            FOR UPDATE SKIP LOCKED))
        RETURNING s.target_id, s.rows, s.shipped_at)
    INSERT INTO tbl_repl.shipped AS s (target_id, pid, rows, shipped_at, txid, receipts)
    SELECT g.target_id, 0, sum(g.rows), max(g.shipped_at), pg_current_xact_id(), 0
    FROM gone AS g JOIN tbl_repl.target AS t USING (target_id) GROUP BY g.target_id
    ON CONFLICT (target_id, pid, turn) DO UPDATE
    SET rows = s.rows + excluded.rows, shipped_at = greatest(s.shipped_at, excluded.shipped_at);
END
$function$;
COMMENT ON FUNCTION tbl_repl._sum_up_shipped() IS 'keeps the figures of backends that have ended in one row a target';

CREATE OR REPLACE FUNCTION tbl_repl._raise_lane(lane tbl_repl.lane)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = lane.code,
        MESSAGE = lane.error,
        DETAIL  = coalesce(lane.detail, format('Sync target on server %I.', (lane.parcels[1]).server)),
        HINT    = coalesce(lane.hint, CASE WHEN lane.code IN ('55P03', '57014')
                               THEN 'Somebody holds the row on the target, perhaps a writer there who waits for this one. The local transaction is rolled back: try it again.'
                               ELSE 'The local transaction is rolled back: what a sync target, or an initial copy, cannot take is not committed here.' END);
END
$function$;
COMMENT ON FUNCTION tbl_repl._raise_lane(tbl_repl.lane) IS 'fails the transaction with what a sync target said';

CREATE OR REPLACE FUNCTION tbl_repl._raise_unreadable(parcel tbl_repl.parcel, code text, message text, detail text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = code,
        MESSAGE = message,
        DETAIL  = coalesce(nullif(detail, ''), format('What sync target %s on server %I is to be sent could not be read here.', parcel.target_id, parcel.server)),
        HINT    = format('Where the table, or a right on it, has changed since the target was defined: SELECT tbl_repl.alter_target(%s);', parcel.target_id);
END
$function$;
COMMENT ON FUNCTION tbl_repl._raise_unreadable(tbl_repl.parcel, text, text, text) IS
    'fails the transaction because rows could not be read for a sync target';

-- _ship_small(parcels, own, mine): one message a connection; sent to all, then waited for together.
-- Returns the targets that failed and may (tolerant); raises what a sync one says.
-- With a sync target among several connections, rows go first and the commits follow when all have
-- answered.  Where sync and tolerant targets share a connection and it fails, the tolerant ones are left out
-- and it is tried again.
CREATE OR REPLACE FUNCTION tbl_repl._ship_small(
    parcels tbl_repl.parcel[],
    own     xid8,
    mine    boolean
)
RETURNS integer[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    parcel    tbl_repl.parcel;
    lanes     tbl_repl.lane[] := '{}';
    lane      tbl_repl.lane;
    failed    integer[] := '{}';
    rendered  record;
    ready     tbl_repl.parcel[] := '{}';
    two_phase boolean;
    first_bad tbl_repl.lane;
    bad       boolean := false;
    finished  integer[] := '{}';
    error_detail text;
    n         integer;
BEGIN
    FOREACH parcel IN ARRAY parcels LOOP
        BEGIN
            rendered := tbl_repl._render_transaction(parcel.target_id, own, mine, 'prepared');
            parcel.deletes := nullif(rendered.deletes, '');
            parcel.upserts := nullif(rendered.upserts, '');
            parcel.rows := rendered.rows;
            IF parcel.rows > 0 THEN
                ready := array_append(ready, parcel);
            END IF;
        EXCEPTION WHEN assert_failure OR OTHERS THEN
            -- a filter or map that fails on a row, a column that is gone: the target's own business
            IF parcel.sync THEN
                GET STACKED DIAGNOSTICS error_detail = PG_EXCEPTION_DETAIL;
                PERFORM tbl_repl._raise_unreadable(parcel, SQLSTATE, SQLERRM, error_detail);
            END IF;
            PERFORM tbl_repl._log_error(parcel.target_id, NULL, SQLSTATE, SQLERRM, NULL, NULL, NULL);
            failed := array_append(failed, parcel.target_id);
        END;
    END LOOP;

    FOR lane IN
        SELECT p.conn, min(p.target_id), bool_or(p.sync), clock_timestamp() + min(p.timeout), 'new',
               array_agg(p ORDER BY p.target_id), NULL, NULL, NULL, NULL, NULL, NULL
        FROM unnest(ready) AS p GROUP BY p.conn ORDER BY 2
    LOOP
        lane.message := tbl_repl._message(lane.parcels, false);
        IF lane.message <> '' THEN
            lanes := array_append(lanes, lane);
        END IF;
    END LOOP;
    two_phase := cardinality(lanes) > 1 AND EXISTS (SELECT FROM unnest(lanes) AS l WHERE l.sync);

    -- Those that are connected first, for connecting may hang; it then costs its own time, not theirs.
    FOR n IN 1 .. cardinality(lanes) LOOP
        IF cardinality(lanes) = 1 OR tbl_repl._is_usable(lanes[n].conn) THEN
            lanes[n] := tbl_repl._lane_send(lanes[n], two_phase);
        END IF;
    END LOOP;
    FOR n IN 1 .. cardinality(lanes) LOOP
        IF lanes[n].state = 'new' THEN
            lane := lanes[n];
            lane.deadline := clock_timestamp() + (SELECT min(p.timeout) FROM unnest(lane.parcels) AS p);
            lanes[n] := tbl_repl._lane_send(lane, two_phase);
        END IF;
    END LOOP;
    FOR turn IN 1 .. cardinality(lanes) LOOP
        n := tbl_repl._next_lane(lanes, finished);
        finished := array_append(finished, n);
        lanes[n] := tbl_repl._lane_finish(lanes[n], own, mine, two_phase);
        IF lanes[n].state = 'failed' AND lanes[n].sync AND NOT bad THEN
            first_bad := lanes[n];
            bad := true;
        END IF;
    END LOOP;
    IF two_phase AND NOT bad THEN
        FOR n IN 1 .. cardinality(lanes) LOOP
            IF lanes[n].state = 'done' THEN
                lane := lanes[n];
                -- a hung neighbour may have used up the time
                lane.deadline := greatest(lane.deadline, clock_timestamp()
                    + (SELECT least(min(p.timeout) / 4, interval '1 second') FROM unnest(lane.parcels) AS p));
                BEGIN
                    PERFORM tbl_repl._send(lane.conn, 'SET CONSTRAINTS ALL IMMEDIATE' || tbl_repl._lease(lane.deadline) || '; COMMIT');
                    lane.state := 'committing';
                EXCEPTION WHEN assert_failure OR OTHERS THEN
                    lane := tbl_repl._lane_failed(lane, SQLSTATE, SQLERRM, NULL, NULL);
                END;
                lanes[n] := lane;
            END IF;
        END LOOP;
        FOR n IN 1 .. cardinality(lanes) LOOP
            IF lanes[n].state = 'committing' THEN
                lanes[n] := tbl_repl._lane_commit(lanes[n]);
            END IF;
            IF lanes[n].state = 'failed' AND lanes[n].sync AND NOT bad THEN
                first_bad := lanes[n];
                bad := true;
            END IF;
        END LOOP;
    END IF;
    IF bad THEN
        FOR n IN 1 .. cardinality(lanes) LOOP
            -- open remote transactions end with their connection
            IF two_phase AND lanes[n].conn = ANY (tbl_repl._dblink_connections()) THEN
                PERFORM tbl_repl._dblink_disconnect(lanes[n].conn);
            END IF;
        END LOOP;
        PERFORM tbl_repl._raise_lane(first_bad);
    END IF;

    FOREACH lane IN ARRAY lanes LOOP
        FOREACH parcel IN ARRAY lane.parcels LOOP
            IF parcel.target_id = ANY (lane.left_out) THEN
                failed := array_append(failed, parcel.target_id);
            ELSIF lane.state = 'failed' THEN
                PERFORM tbl_repl._log_error(parcel.target_id, NULL, lane.code, lane.error, lane.detail, lane.hint,
                                            tbl_repl._sent_sql(parcel.target_id, own, mine));
                failed := array_append(failed, parcel.target_id);
            ELSE
                PERFORM tbl_repl._count_shipped(parcel.target_id, parcel.rows);
            END IF;
        END LOOP;
    END LOOP;
    RETURN failed;
END
$function$;
COMMENT ON FUNCTION tbl_repl._ship_small(tbl_repl.parcel[], xid8, boolean) IS
    'ships few rows: one message a connection, all at once';

CREATE OR REPLACE FUNCTION tbl_repl._lane_failed(
    lane   tbl_repl.lane,
    code   text,
    error  text,
    detail text,
    hint   text
)
RETURNS tbl_repl.lane
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    lane.state := 'failed';
    lane.code := _lane_failed.code;
    lane.error := _lane_failed.error;
    lane.detail := nullif(_lane_failed.detail, '');
    lane.hint := nullif(_lane_failed.hint, '');
    RETURN lane;
END
$function$;
COMMENT ON FUNCTION tbl_repl._lane_failed(tbl_repl.lane, text, text, text, text) IS 'notes why a connection failed';

CREATE OR REPLACE FUNCTION tbl_repl._lane_text(lane tbl_repl.lane, two_phase boolean)
RETURNS text
LANGUAGE sql VOLATILE
-- two_phase: what is deferred on the target has to be found out before anybody commits
RETURN CASE WHEN two_phase THEN format('BEGIN; %s%s; SET CONSTRAINTS ALL IMMEDIATE', lane.message, tbl_repl._seal(lane.parcels, lane.deadline))
            ELSE lane.message || tbl_repl._seal(lane.parcels, lane.deadline) END;
COMMENT ON FUNCTION tbl_repl._lane_text(tbl_repl.lane, boolean) IS
    'the message of a connection: a transaction of its own, or the first half of one';

-- _lane_send(lane, two_phase): connects if need be, and sends.  Never raises: the other connections have
-- to be served.  A connection that turns out to be dead before anything was sent is opened again.
CREATE OR REPLACE FUNCTION tbl_repl._lane_send(
    lane      tbl_repl.lane,
    two_phase boolean
)
RETURNS tbl_repl.lane
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    error_text   text;
    error_detail text;
    error_hint   text;
    sending      boolean := false;
BEGIN
    PERFORM tbl_repl._connect(lane.target_id, lane.conn, lane.deadline);
    sending := true;
    IF tbl_repl._dblink_send(lane.conn, tbl_repl._lane_text(lane, two_phase)) <> 1 THEN
        sending := false;
        IF clock_timestamp() > lane.deadline THEN
            RAISE EXCEPTION USING
                ERRCODE = 'connection_failure',
                MESSAGE = 'the target did not take the message in time';
        END IF;
        PERFORM tbl_repl._dblink_disconnect(lane.conn);
        PERFORM tbl_repl._connect(lane.target_id, lane.conn, lane.deadline);
        sending := true;
        PERFORM tbl_repl._send(lane.conn, tbl_repl._lane_text(lane, two_phase));
    END IF;
    lane.state := 'sent';
    RETURN lane;
EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
    IF sending AND SQLSTATE = '57014' THEN
        -- a cancel right behind the sending: whoever waits for the answer finds out
        lane.state := 'sent';
        RETURN lane;
    ELSIF SQLSTATE = '57014' AND clock_timestamp() > lane.deadline THEN
        -- by the worker, or by who waits for us (see _open)
        RETURN tbl_repl._lane_failed(lane, '08001', 'the target does not answer', 'Connecting to it took longer than timeout, and was cancelled.', NULL);
    END IF;
    GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT;
    RETURN tbl_repl._lane_failed(lane, SQLSTATE, error_text, error_detail, error_hint);
END
$function$;
COMMENT ON FUNCTION tbl_repl._lane_send(tbl_repl.lane, boolean) IS 'sends a connection its message';

-- _lane_finish(lane, own, mine, two_phase): waits for the answer (state 'refused': it was an error, code and so on
-- say which); where an order of statements or a
-- missing prepared statement was the reason, tries another way; after a loss, once more over a new connection, for
-- the old session is known to be gone then.  Gives up when the lease is over, not before.
CREATE OR REPLACE FUNCTION tbl_repl._lane_finish(
    lane      tbl_repl.lane,
    own       xid8,
    mine      boolean,
    two_phase boolean
)
RETURNS tbl_repl.lane
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    error_text   text;
    error_detail text;
    error_hint   text;
    code         text;
    tried        text[] := '{}';
    parcel       tbl_repl.parcel;
    cleared      tbl_repl.parcel[] := '{}';
    rendered     record;
    first_error  tbl_repl.lane;
    answered     boolean := lane.state = 'refused';
    context      text;
BEGIN
    IF lane.state NOT IN ('sent', 'refused') THEN
        RETURN tbl_repl._lane_by_parts(lane, own, mine, two_phase);
    END IF;
    LOOP
        IF answered THEN
            lane.state := 'failed';
            answered := false;
        ELSE
            BEGIN
                IF tbl_repl._receive(lane.conn, lane.deadline, true) IS NULL THEN
                    RAISE EXCEPTION USING
                        ERRCODE = 'connection_failure',
                        MESSAGE = 'the target has got no message';
                END IF;
                lane.state := 'done';
                RETURN lane;
            EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
                GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT,
                    context = PG_EXCEPTION_CONTEXT;
                -- cancelled here: the answer is still to come
                CONTINUE WHEN SQLSTATE = '57014' AND NOT tbl_repl._is_too_slow(SQLSTATE, context, lane.conn) AND clock_timestamp() < lane.deadline;
                lane := tbl_repl._lane_failed(lane, SQLSTATE, error_text, error_detail, error_hint);
            END;
        END IF;
        code := lane.code;
        EXIT WHEN clock_timestamp() > lane.deadline;
        IF first_error.code IS NULL OR first_error.code = '26000' THEN
            first_error := lane;
        END IF;
        BEGIN
            IF two_phase AND lane.conn = ANY (tbl_repl._dblink_connections()) THEN
                PERFORM tbl_repl._call(lane.conn, 'ROLLBACK', lane.deadline, true);
            END IF;
            IF code ~ '^(08|57P)' AND NOT 'lost' = ANY (tried) THEN
                tried := array_append(tried, 'lost');
                EXIT WHEN clock_timestamp() > lane.deadline;
                PERFORM tbl_repl._connect(lane.target_id, lane.conn, lane.deadline, lane.deadline);
            ELSIF code IN ('42501', '42883', '3F000') AND NOT 'receipt' = ANY (tried)
                  AND EXISTS (SELECT FROM unnest(lane.parcels) AS p JOIN tbl_repl.target AS t ON t.target_id = p.target_id WHERE t.receipts) THEN
                -- perhaps receipts may not be left any more: a new connection asks
                tried := array_append(tried, 'receipt');
                PERFORM tbl_repl._dblink_disconnect(lane.conn);
                PERFORM tbl_repl._connect(lane.target_id, lane.conn, lane.deadline, lane.deadline);
            ELSIF code = '26000' AND NOT 'prepare' = ANY (tried) THEN
                tried := array_append(tried, 'prepare');
                PERFORM tbl_repl._prepare_again(lane.conn, ARRAY(SELECT p.target_id FROM unnest(lane.parcels) AS p), lane.deadline, true);
            ELSIF code = '23503' AND NOT 'upserts first' = ANY (tried) THEN
                tried := array_append(tried, 'upserts first');
                lane.message := 'SET CONSTRAINTS ALL DEFERRED; ' || tbl_repl._message(lane.parcels, true);
            ELSIF code = '23505' AND NOT 'clear' = ANY (tried) THEN
                tried := array_append(tried, 'clear');
                cleared := '{}';
                FOREACH parcel IN ARRAY lane.parcels LOOP
                    rendered := tbl_repl._render_transaction(parcel.target_id, own, mine, 'clear');
                    parcel.deletes := nullif(rendered.deletes, '');
                    parcel.upserts := nullif(rendered.upserts, '');
                    cleared := array_append(cleared, parcel);
                END LOOP;
                lane.message := 'SET CONSTRAINTS ALL DEFERRED; ' || tbl_repl._message(cleared, false);
            ELSE
                EXIT;
            END IF;
            PERFORM tbl_repl._send(lane.conn, tbl_repl._lane_text(lane, two_phase));
        EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
            IF code = '26000' THEN
                -- why it cannot be prepared says more than that it is not
                GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT;
                first_error := tbl_repl._lane_failed(lane, SQLSTATE, error_text, error_detail, error_hint);
            END IF;
            EXIT;
        END;
    END LOOP;
    IF code ~ '^08' AND code <> '08000' AND NOT two_phase THEN
        -- Lost, and the old session could not be ended: its message dies with the lease.
        PERFORM tbl_repl._outlive(lane.deadline);
    ELSIF NOT two_phase AND lane.conn = ANY (tbl_repl._dblink_connections()) THEN
        -- libpq shows the last error until something succeeds, and by an error a dead connection is told
        BEGIN
            PERFORM tbl_repl._call(lane.conn, 'SELECT 1', lane.deadline, true);
        EXCEPTION WHEN assert_failure OR OTHERS THEN
            NULL;
        END;
    END IF;
    -- the first reason is the one to tell
    IF first_error.code IS NULL THEN
        first_error := lane;
    END IF;
    RETURN tbl_repl._lane_by_parts(first_error, own, mine, two_phase);
END
$function$;
COMMENT ON FUNCTION tbl_repl._lane_finish(tbl_repl.lane, xid8, boolean, boolean) IS
    'waits for the answer of a connection, tries other ways where there are any';

CREATE OR REPLACE FUNCTION tbl_repl._prepare_again(
    conn      text,
    targets   integer[],
    deadline  timestamptz,
    at_commit boolean DEFAULT false
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item  record;
    known text;
BEGIN
    FOR item IN
        SELECT tbl_repl._prepare_sql(t) AS statement, t.target_id, t.generation
        FROM tbl_repl.target AS t WHERE t.target_id = ANY (targets)
    LOOP
        known := tbl_repl._call(conn, format('SELECT pg_catalog.count(*) FROM pg_catalog.pg_prepared_statements WHERE name IN (%L, %L)',
                                             format('tbl_repl_u%s_%s', item.target_id, item.generation),
                                             format('tbl_repl_d%s_%s', item.target_id, item.generation)), deadline, at_commit);
        IF known <> '2' THEN
            -- one of two: the second one could not be prepared, and says why
            PERFORM tbl_repl._send(conn, CASE WHEN known = '1' THEN format('DEALLOCATE tbl_repl_u%s_%s; ', item.target_id, item.generation) ELSE '' END
                                         || item.statement);
            PERFORM tbl_repl._receive(conn, deadline, at_commit, NOT at_commit);
        END IF;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._prepare_again(text, integer[], timestamptz, boolean) IS
    'prepares what a connection does not know yet';

-- A target must not fail because it shares a connection with a bad one: the sync ones are tried together, then
-- each tolerant one.  Where commits wait for other connections the tolerant ones are left to the queue.
CREATE OR REPLACE FUNCTION tbl_repl._lane_by_parts(
    lane      tbl_repl.lane,
    own       xid8,
    mine      boolean,
    two_phase boolean
)
RETURNS tbl_repl.lane
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    part tbl_repl.lane := lane;
    item record;
BEGIN
    IF cardinality(lane.parcels) = 1 OR NOT EXISTS (SELECT FROM unnest(lane.parcels) AS p WHERE NOT p.sync)
       OR (two_phase AND NOT lane.sync) OR clock_timestamp() > lane.deadline OR lane.code ~ '^(08|57P)' THEN
        RETURN lane;
    END IF;
    FOR item IN
        SELECT p.sync, array_agg(p ORDER BY p.target_id) AS parcels
        FROM unnest(lane.parcels) AS p
        GROUP BY p.sync, CASE WHEN NOT p.sync THEN p.target_id END
        ORDER BY p.sync DESC, min(p.fk_rank), min(p.target_id)
    LOOP
        part.parcels := item.parcels;
        part.sync := item.sync;
        part.state := 'new';
        part.message := tbl_repl._message(part.parcels, false);
        part.deadline := lane.deadline;
        IF item.sync THEN
            -- the bad one may have used up the time
            part.deadline := greatest(lane.deadline, clock_timestamp() + (SELECT least(min(p.timeout) / 4, interval '1 second') FROM unnest(part.parcels) AS p));
        END IF;
        IF item.sync OR NOT two_phase THEN
            part := tbl_repl._lane_finish(tbl_repl._lane_send(part, two_phase), own, mine, two_phase);
            IF item.sync AND part.state = 'failed' AND part.code ~ '^08' THEN
                -- waits for the same, but for a shorter time
                part := tbl_repl._lane_failed(part, lane.code, lane.error, lane.detail, lane.hint);
            END IF;
        ELSE
            part := tbl_repl._lane_failed(part, lane.code, lane.error, lane.detail, lane.hint);
        END IF;
        IF part.state = 'failed' AND item.sync THEN
            RETURN part;
        ELSIF part.state = 'failed' THEN
            lane.left_out := array_append(lane.left_out, (item.parcels[1]).target_id);
            PERFORM tbl_repl._log_error((item.parcels[1]).target_id, NULL, part.code, part.error, part.detail, part.hint,
                                        tbl_repl._sent_sql((item.parcels[1]).target_id, own, mine));
        END IF;
    END LOOP;
    lane.state := 'done';
    RETURN lane;
END
$function$;
COMMENT ON FUNCTION tbl_repl._lane_by_parts(tbl_repl.lane, xid8, boolean, boolean) IS
    'ships to the targets of a connection that failed, without those that are to blame';

-- The next connection that has its answer, or none to expect; so that no retry of a healthy one waits for a
-- hung one.
CREATE OR REPLACE FUNCTION tbl_repl._next_lane(lanes tbl_repl.lane[], finished integer[])
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    spinning timestamptz := clock_timestamp() + interval '2 milliseconds';
    first    integer;
BEGIN
    LOOP
        first := NULL;
        FOR n IN 1 .. cardinality(lanes) LOOP
            CONTINUE WHEN n = ANY (finished);
            first := coalesce(first, n);
            IF cardinality(finished) = cardinality(lanes) - 1 OR lanes[n].state <> 'sent'
               OR clock_timestamp() > lanes[n].deadline OR tbl_repl._dblink_is_busy(lanes[n].conn) = 0 THEN
                RETURN n;
            END IF;
        END LOOP;
        IF clock_timestamp() > spinning THEN
            PERFORM pg_sleep(0.0005);
        END IF;
    END LOOP;
EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
    -- who waits for that one deals with it
    RETURN coalesce(first, (SELECT min(n) FROM generate_subscripts(lanes, 1) AS n WHERE n <> ALL (finished)));
END
$function$;
COMMENT ON FUNCTION tbl_repl._next_lane(tbl_repl.lane[], integer[]) IS
    'number of the connection to be looked at next';

CREATE OR REPLACE FUNCTION tbl_repl._lane_commit(lane tbl_repl.lane)
RETURNS tbl_repl.lane
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    error_text   text;
    error_detail text;
    error_hint   text;
BEGIN
    PERFORM tbl_repl._receive(lane.conn, lane.deadline, true);
    lane.state := 'done';
    RETURN lane;
EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
    GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT;
    IF SQLSTATE ~ '^08' AND SQLSTATE <> '08000' THEN
        PERFORM tbl_repl._outlive(lane.deadline);
    ELSIF lane.conn = ANY (tbl_repl._dblink_connections()) THEN
        PERFORM tbl_repl._dblink_disconnect(lane.conn);
    END IF;
    RETURN tbl_repl._lane_failed(lane, SQLSTATE, error_text, error_detail, error_hint);
END
$function$;
COMMENT ON FUNCTION tbl_repl._lane_commit(tbl_repl.lane) IS 'waits for a commit';

-- _ship_large(parcels, own, mine): many rows, or a whole table after TRUNCATE or for the initial copy: one
-- remote transaction a connection, in messages of bounded size, one connection after the other; the commits come
-- last.  Returns the targets that failed and may; raises what a sync one says.
-- Waiting does not add up.  All connections are asked at once whether they are alive, those that answer are
-- served first; what tolerant ones then lose for us by failing is taken from what the others are given.
CREATE OR REPLACE FUNCTION tbl_repl._ship_large(
    parcels tbl_repl.parcel[],
    own     xid8,
    mine    boolean
)
RETURNS integer[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    is_sync      boolean;
    lanes        tbl_repl.lane[];
    lane         tbl_repl.lane;
    finished     integer[];
    unasked      integer[];
    n            integer;
    began        timestamptz;
    bound        interval;
    patience     interval;
    lost         interval := '0';
    done         text[] := '{}';
    failed       integer[] := '{}';
    loads        tbl_repl.load[];
    shipped      jsonb;
    receipts     jsonb;
    error_text   text;
    error_detail text;
    error_hint   text;
    context      text;
    parcel       tbl_repl.parcel;
BEGIN
    -- sync targets first, in transactions of their own: all of them or none
    FOREACH is_sync IN ARRAY '{true,false}'::boolean[] LOOP
        SELECT array_agg(ROW(g.conn, g.target_id, is_sync, clock_timestamp() + g.timeout, 'new', g.parcels,
                             NULL, NULL, NULL, NULL, NULL, NULL)::tbl_repl.lane ORDER BY g.target_id)
        INTO lanes
        FROM (SELECT p.conn, min(p.target_id) AS target_id, max(p.timeout) AS timeout, array_agg(p ORDER BY p.target_id) AS parcels
              FROM unnest(parcels) AS p WHERE p.sync = is_sync GROUP BY p.conn) AS g;
        CONTINUE WHEN lanes IS NULL;
        finished := '{}';
        unasked := '{}';
        FOR i IN 1 .. cardinality(lanes) LOOP
            IF tbl_repl._is_usable(lanes[i].conn) AND tbl_repl._dblink_send(lanes[i].conn, 'SELECT 1') = 1 THEN
                lane := lanes[i];
                lane.state := 'sent';
                lanes[i] := lane;
            ELSE
                -- connecting may hang: last
                unasked := array_append(unasked, i);
            END IF;
        END LOOP;
        FOR turn IN 1 .. cardinality(lanes) LOOP
            began := clock_timestamp();
            IF turn <= cardinality(lanes) - cardinality(unasked) THEN
                n := tbl_repl._next_lane(lanes, finished || unasked);
                finished := array_append(finished, n);
            ELSE
                n := unasked[turn - cardinality(lanes) + cardinality(unasked)];
            END IF;
            lane := lanes[n];
            bound := (lane.parcels[1]).timeout;
            patience := CASE WHEN is_sync THEN bound ELSE greatest(bound - lost, least(bound, greatest(bound / 10, interval '200 milliseconds'))) END;
            BEGIN
                IF lane.state = 'sent' THEN
                    BEGIN
                        PERFORM tbl_repl._receive(lane.conn, lane.deadline);
                    EXCEPTION WHEN assert_failure OR OTHERS THEN
                        -- often found out only now, and one that can be opened again is none that hangs
                        IF clock_timestamp() > lane.deadline THEN
                            RAISE;
                        END IF;
                        IF lane.conn = ANY (tbl_repl._dblink_connections()) THEN
                            PERFORM tbl_repl._dblink_disconnect(lane.conn);
                        END IF;
                    END;
                END IF;
                PERFORM tbl_repl._connect(lane.target_id, lane.conn, clock_timestamp() + patience);
                SELECT array_agg(l) INTO loads
                FROM unnest(lane.parcels) AS p CROSS JOIN LATERAL tbl_repl._loads_of_transaction(p.target_id, own) AS l;
                IF loads IS NULL THEN
                    CONTINUE;
                END IF;
                shipped := tbl_repl._stream_any_way(lane.conn, loads, mine, patience);
                receipts := tbl_repl._leave_receipts(lane.conn, loads, own, patience);
                IF is_sync THEN
                    done := array_append(done, lane.conn);
                ELSE
                    PERFORM tbl_repl._commit(lane.conn, patience);
                END IF;
                FOREACH parcel IN ARRAY lane.parcels LOOP
                    PERFORM tbl_repl._count_shipped(parcel.target_id, coalesce((shipped ->> parcel.target_id::text)::bigint, 0),
                                                    coalesce((receipts ->> parcel.target_id::text)::integer, 0));
                END LOOP;
            EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
                GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT,
                    context = PG_EXCEPTION_CONTEXT;
                IF lane.conn = ANY (tbl_repl._dblink_connections()) THEN
                    PERFORM tbl_repl._dblink_disconnect(lane.conn);
                END IF;
                IF is_sync THEN
                    -- open remote transactions end with their connection; the others have an answer nobody reads
                    PERFORM tbl_repl._dblink_disconnect(l.conn) FROM unnest(lanes) AS l WHERE l.conn = ANY (tbl_repl._dblink_connections());
                    IF SQLSTATE = '57014' AND NOT tbl_repl._is_too_slow(SQLSTATE, context, lane.conn) THEN
                        RAISE;
                    END IF;
                    PERFORM tbl_repl._raise_lane(tbl_repl._lane_failed(lane, SQLSTATE, error_text, nullif(error_detail, ''), nullif(error_hint, '')));
                END IF;
                lost := lost + (clock_timestamp() - began);
                FOREACH parcel IN ARRAY lane.parcels LOOP
                    PERFORM tbl_repl._log_error(parcel.target_id, NULL, SQLSTATE, error_text, error_detail, error_hint, NULL);
                    failed := array_append(failed, parcel.target_id);
                END LOOP;
            END;
        END LOOP;
        PERFORM tbl_repl._commit_all(done, parcels);
        done := '{}';
    END LOOP;
    RETURN failed;
END
$function$;
COMMENT ON FUNCTION tbl_repl._ship_large(tbl_repl.parcel[], xid8, boolean) IS
    'ships many rows or whole tables in messages of bounded size';

CREATE OR REPLACE FUNCTION tbl_repl._commit_all(conns text[], parcels tbl_repl.parcel[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    one   text;
    bound interval;
BEGIN
    FOREACH one IN ARRAY conns LOOP
        SELECT max(p.timeout) INTO bound FROM unnest(parcels) AS p WHERE p.conn = one;
        PERFORM tbl_repl._commit(one, bound);
    END LOOP;
EXCEPTION WHEN assert_failure OR OTHERS THEN
    -- open remote transactions end with their connection
    PERFORM tbl_repl._dblink_disconnect(c) FROM unnest(conns) AS c WHERE c = ANY (tbl_repl._dblink_connections());
    RAISE;
END
$function$;
COMMENT ON FUNCTION tbl_repl._commit_all(text[], tbl_repl.parcel[]) IS
    'commits the remote transactions that wait for it';

-- What a transaction in flight has for one target, as loads: a whole table, or keys.
CREATE OR REPLACE FUNCTION tbl_repl._loads_of_transaction(target_id integer, own xid8)
RETURNS SETOF tbl_repl.load
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target tbl_repl.target%ROWTYPE;
    ops    "char"[];
    copies boolean;
BEGIN
    SELECT * INTO STRICT target FROM tbl_repl.target AS t WHERE t.target_id = _loads_of_transaction.target_id;
    SELECT array_agg(DISTINCT s.op) FILTER (WHERE s.op <> 'T' OR s.keys IS NULL),
           bool_or(s.op = 'C' AND s.target_id = target.target_id)
    INTO ops, copies
    FROM tbl_repl.stash AS s WHERE s.txid = own AND s.source_id = target.source_id;
    RETURN QUERY SELECT l.* FROM tbl_repl._loads(target, ops, coalesce(copies, false), format(
        'tbl_repl.stash AS c WHERE c.txid = %L AND c.source_id = %s AND c.keys IS NOT NULL', own, target.source_id)) AS l;
END
$function$;
COMMENT ON FUNCTION tbl_repl._loads_of_transaction(integer, xid8) IS
    'what a transaction in flight has for one target';
