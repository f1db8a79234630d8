-- Receipt: finds and heals what a target has committed and this node has not.
--
-- The remote commit comes before the local one.  Between the two a writer may be killed, the server may crash, or
-- the local commit may fail; or the answer was lost, or the message was still on its way.  So, where the target
-- has the extension, the remote transaction itself also leaves a receipt there: which transaction of which node it
-- is, and which keys it has shipped.  Every replay asks for them: committed here: the receipt goes; in progress:
-- it stays; anything else: its keys are queued, for shipping their present state heals the target.
--
-- Why it is right.  Receipt and rows are one remote transaction, so no row is in doubt without a receipt.  A
-- receipt goes only when its transaction is known to have committed here, or when a transaction that has queued
-- its keys has: they are never in neither place.  Healing what needs none ships what is there already.
--
-- The session's next transaction takes over the receipt of its last one, in the same message and by an update in
-- place; that one has committed if its row in tbl_repl.shipped is there.  So receipts are as many as sessions.

-- _leave_receipt: run on the target, by the transaction that ships.  former: the session's last transaction,
-- known to have committed there; former_many: it has left more than one.
-- SECURITY DEFINER: the role that ships may have no right on the table.
CREATE OR REPLACE FUNCTION tbl_repl._leave_receipt(
    node        text,
    pid         integer,
    target_id   integer,
    boot        uuid,
    xid         xid8,
    part        integer,
    keys        text[],
    former      xid8,
    former_many boolean
)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF former_many THEN
        DELETE FROM tbl_repl.receipt AS r
        WHERE r.node = _leave_receipt.node AND r.target_id = _leave_receipt.target_id AND r.pid = _leave_receipt.pid
          AND r.xid = former AND r.part > 0;
    END IF;
    IF former IS NOT NULL THEN
        UPDATE tbl_repl.receipt AS r
        SET boot = _leave_receipt.boot, xid = _leave_receipt.xid, keys = _leave_receipt.keys, at = clock_timestamp()
        WHERE r.node = _leave_receipt.node AND r.target_id = _leave_receipt.target_id AND r.pid = _leave_receipt.pid
          AND r.xid = former AND r.part = 0;
        IF FOUND THEN
            RETURN true;
        END IF;
    END IF;
    INSERT INTO tbl_repl.receipt (node, target_id, pid, boot, xid, part, keys)
    VALUES (node, target_id, pid, boot, xid, part, keys);
    RETURN true;
END
$function$;
COMMENT ON FUNCTION tbl_repl._leave_receipt(text, integer, integer, uuid, xid8, integer, text[], xid8, boolean) IS
    'notes on the target that a transaction of another node has committed here; SECURITY DEFINER, for the role that ships';

-- SQL, run on the target: whether our role there may leave receipts.
CREATE OR REPLACE FUNCTION tbl_repl._may_leave_receipts()
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT $sql$EXISTS (
        SELECT FROM pg_catalog.pg_proc AS f JOIN pg_catalog.pg_namespace AS n ON n.oid = f.pronamespace
        WHERE n.nspname = 'tbl_repl' AND f.proname = '_leave_receipt'
          AND pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_function_privilege(f.oid, 'EXECUTE'))$sql$
$function$;
COMMENT ON FUNCTION tbl_repl._may_leave_receipts() IS 'SQL condition that says on a target whether receipts may be left there';

-- The statement that ends a message: it leaves the receipt and sees to the lease.  A connection on which none may
-- be left (a right was taken away since the target was defined) knows it as one that sees to the lease only.
CREATE OR REPLACE FUNCTION tbl_repl._prepare_receipt(allowed boolean)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('PREPARE tbl_repl_receipt (float8, integer, uuid, xid8, integer, text[], xid8, boolean) AS SELECT CASE WHEN %s THEN %s END',
                  CASE WHEN allowed THEN format('tbl_repl._leave_receipt(%L, %s, $2, $3, $4, $5, $6, $7, $8)', tbl_repl.node_name(), pg_backend_pid())
                       ELSE 'true' END, tbl_repl._in_time('$1'))
$function$;
COMMENT ON FUNCTION tbl_repl._prepare_receipt(boolean) IS
    'prepares on a target the statement that leaves a receipt';

-- Which run of this server we are in.  NULL while another transaction is giving it a name: receipts without one
-- are healed as those of another run are.  One that is rolled back after all names a run that never was: the same.
CREATE OR REPLACE FUNCTION tbl_repl._boot()
RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    boot uuid;
BEGIN
    SELECT b.id INTO boot FROM tbl_repl.boot AS b;
    IF NOT FOUND AND current_setting('transaction_isolation') = 'read committed'
       AND pg_try_advisory_xact_lock(tbl_repl._lock_resolve(), 0) THEN
        INSERT INTO tbl_repl.boot (cluster) VALUES (tbl_repl._cluster()) ON CONFLICT DO NOTHING RETURNING id INTO boot;
    END IF;
    RETURN boot;
END
$function$;
COMMENT ON FUNCTION tbl_repl._boot() IS 'id of this run of the server, between two crashes';

CREATE OR REPLACE FUNCTION tbl_repl._cluster()
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('%s.%s', p.system_identifier, p.timeline) FROM tbl_repl._place() AS p
$function$;
COMMENT ON FUNCTION tbl_repl._cluster() IS 'system identifier and timeline of this server';

-- The statement that leaves a receipt for this transaction and target, at the end of a message.  A transaction that
-- has shipped there before (changes made after the first flush) leaves one more.
CREATE OR REPLACE FUNCTION tbl_repl._receipt(
    target_id integer,
    part      integer,
    keys      text[],
    deadline  timestamptz
)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    own  xid8 := pg_current_xact_id();
    last record;
BEGIN
    -- the usual case, in one query
    SELECT s.txid, s.receipts, b.id AS boot INTO last
    FROM (SELECT x.txid, x.receipts FROM tbl_repl.shipped AS x
          WHERE x.target_id = _receipt.target_id AND x.pid = pg_backend_pid() ORDER BY x.turn DESC LIMIT 1) AS s, tbl_repl.boot AS b
    WHERE s.txid <> own AND s.receipts = 1;
    IF FOUND AND part = 0 THEN
        RETURN format('; EXECUTE tbl_repl_receipt(%s, %s, ''%s'', ''%s'', 0, %L, ''%s'', false)', extract(epoch FROM deadline)::numeric, target_id,
                      last.boot, own, keys, last.txid);
    END IF;
    SELECT s.txid, s.receipts INTO last
    FROM tbl_repl.shipped AS s WHERE s.target_id = _receipt.target_id AND s.pid = pg_backend_pid() ORDER BY s.turn DESC LIMIT 1;
    RETURN format('; EXECUTE tbl_repl_receipt(%s, %s, %L, %L, %s, %L, %L, %L)', extract(epoch FROM deadline)::numeric, target_id,
                  tbl_repl._boot(), own, part + CASE WHEN last.txid = own THEN last.receipts ELSE 0 END, keys,
                  CASE WHEN last.txid <> own AND part = 0 THEN last.txid END, coalesce(last.receipts > 1, false));
END
$function$;
COMMENT ON FUNCTION tbl_repl._receipt(integer, integer, text[], timestamptz) IS
    'statement that leaves a receipt, and fails on the target after the deadline';

-- What ends a message of few rows.
CREATE OR REPLACE FUNCTION tbl_repl._seal(parcels tbl_repl.parcel[], deadline timestamptz)
RETURNS text
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT coalesce(string_agg(tbl_repl._receipt(p.target_id, 0, k.keys, deadline), ''), tbl_repl._lease(deadline))
    FROM unnest(parcels) AS p
    JOIN tbl_repl.target AS t ON t.target_id = p.target_id AND t.receipts
    CROSS JOIN LATERAL (SELECT array_agg(DISTINCT k) AS keys FROM tbl_repl.stash AS s CROSS JOIN unnest(s.keys) AS k
                        WHERE s.txid = pg_current_xact_id() AND s.source_id = p.source_id) AS k
$function$;
COMMENT ON FUNCTION tbl_repl._seal(tbl_repl.parcel[], timestamptz) IS
    'end of a message: receipts where the target takes them, and the lease';

-- _leave_receipts(conn, loads, own, timeout): the same for many rows, in the remote transaction that is open; how many
-- for each target.  A table that is copied needs none: were add_target rolled back, there would be no target.
CREATE OR REPLACE FUNCTION tbl_repl._leave_receipts(
    conn    text,
    loads   tbl_repl.load[],
    own     xid8,
    timeout interval
)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    load   record;
    portal refcursor;
    keys   text[];
    part   integer;
    counts jsonb := '{}';
BEGIN
    FOR load IN
        SELECT l.target_id, l.chunks, l.truncate
        FROM unnest(loads) AS l JOIN tbl_repl.target AS t ON t.target_id = l.target_id
        WHERE t.receipts
          AND NOT EXISTS (SELECT FROM tbl_repl.stash AS s WHERE s.txid = own AND s.op = 'C' AND s.target_id = l.target_id)
    LOOP
        IF counts = '{}' THEN
            PERFORM tbl_repl._call(conn, 'SAVEPOINT tbl_repl', clock_timestamp() + timeout);
        END IF;
        OPEN portal FOR EXECUTE CASE WHEN load.truncate THEN 'SELECT NULL::text[]' ELSE load.chunks END;
        LOOP
            FETCH portal INTO keys;
            EXIT WHEN NOT FOUND;
            part := coalesce((counts ->> load.target_id::text)::integer, 0);
            BEGIN
                PERFORM tbl_repl._call(conn, substr(tbl_repl._receipt(load.target_id, part, keys, clock_timestamp() + timeout), 3),
                                       clock_timestamp() + timeout);
            EXCEPTION WHEN insufficient_privilege OR undefined_function OR invalid_schema_name THEN
                -- a right was taken away: not worth a transaction
                PERFORM tbl_repl._call(conn, 'ROLLBACK TO tbl_repl', clock_timestamp() + timeout);
                RETURN '{}';
            END;
            counts := jsonb_set(counts, ARRAY[load.target_id::text], to_jsonb(part + 1));
        END LOOP;
        CLOSE portal;
    END LOOP;
    RETURN counts;
END
$function$;
COMMENT ON FUNCTION tbl_repl._leave_receipts(text, tbl_repl.load[], xid8, interval) IS
    'leaves receipts for many rows; their number by target';

-- The three by which the node that has left receipts reads and removes its own.
-- SECURITY DEFINER, each: the role that asks may have no right on the table.
CREATE OR REPLACE FUNCTION tbl_repl._receipts(node text)
RETURNS TABLE (target_id integer, boot uuid, xid xid8, parts integer[], whole boolean, row_count bigint)
LANGUAGE sql STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT r.target_id, r.boot, r.xid, array_agg(DISTINCT r.part), bool_or(r.keys IS NULL), sum(coalesce(cardinality(r.keys), 1))
    FROM tbl_repl.receipt AS r WHERE r.node = _receipts.node
    GROUP BY r.target_id, r.boot, r.xid
$function$;
COMMENT ON FUNCTION tbl_repl._receipts(text) IS
    'receipts that a node has left here; SECURITY DEFINER, for the role that ships';

-- NULL: the whole table.
CREATE OR REPLACE FUNCTION tbl_repl._receipt_keys(
    node      text,
    target_id integer,
    boot      uuid,
    xid       xid8,
    part      integer
)
RETURNS text[]
LANGUAGE sql STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN NOT bool_or(r.keys IS NULL) THEN array_agg(DISTINCT k) END
    FROM tbl_repl.receipt AS r LEFT JOIN LATERAL unnest(r.keys) AS k ON true
    WHERE r.node = _receipt_keys.node AND r.target_id = _receipt_keys.target_id AND r.xid = _receipt_keys.xid
      AND r.boot IS NOT DISTINCT FROM _receipt_keys.boot AND r.part = _receipt_keys.part
$function$;
COMMENT ON FUNCTION tbl_repl._receipt_keys(text, integer, uuid, xid8, integer) IS
    'keys of a receipt that a node has left here; SECURITY DEFINER, for the role that ships';

-- One that is being taken over is left to the next time.
CREATE OR REPLACE FUNCTION tbl_repl._remove_receipts(
    node    text,
    targets integer[],
    boots   uuid[],
    xids    xid8[]
)
RETURNS void
LANGUAGE sql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
    DELETE FROM tbl_repl.receipt AS r
    WHERE r.ctid = ANY (ARRAY(
        SELECT o.ctid FROM tbl_repl.receipt AS o
        JOIN unnest(targets, boots, xids) AS u (target_id, boot, xid)
          ON o.target_id = u.target_id AND o.xid = u.xid AND o.boot IS NOT DISTINCT FROM u.boot
        WHERE o.node = _remove_receipts.node
        FOR UPDATE OF o SKIP LOCKED))
$function$;
COMMENT ON FUNCTION tbl_repl._remove_receipts(text, integer[], uuid[], xid8[]) IS
    'removes receipts that a node has left here; SECURITY DEFINER, for the role that ships';

-- _resolve_receipts(server, always): settles the receipts on the targets' servers that can be reached.  Without
-- always, the worker: every two seconds at the most, every half minute after a failure.
-- A server that something is queued for is connected to by replay itself, and looked at by the next one.
CREATE OR REPLACE FUNCTION tbl_repl._resolve_receipts(server name, always boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    lane    record;
    setting text;
    waits   integer;
BEGIN
    IF NOT EXISTS (SELECT FROM tbl_repl.target AS t WHERE t.receipts) THEN
        RETURN;
    END IF;
    FOR lane IN
        SELECT f.oid AS server_id, min(t.target_id) AS target_id, t.timeout,
               tbl_repl._connection_name(t.server, t.owner, t.timeout) AS conn,
               bool_or(st.status <> 'ok' OR tbl_repl._has_pending(t.target_id)) AS busy,
               bool_or(EXISTS (SELECT FROM tbl_repl.doubt AS b WHERE b.target_id = t.target_id)) AS healing
        FROM tbl_repl.target AS t JOIN tbl_repl.target_state AS st USING (target_id) JOIN pg_foreign_server AS f ON f.srvname = t.server
        WHERE (_resolve_receipts.server IS NULL OR t.server = _resolve_receipts.server) AND t.receipts
        GROUP BY f.oid, t.server, t.owner, t.timeout
        ORDER BY 2
    LOOP
        setting := format('tbl_repl.receipts_after_%s', lane.server_id);
        CONTINUE WHEN lane.busy AND NOT tbl_repl._is_usable(lane.conn);
        CONTINUE WHEN NOT always AND NOT lane.healing
                  AND tbl_repl._seconds_until(to_timestamp(nullif(current_setting(setting, true), '')::double precision)) > 0;
        CONTINUE WHEN NOT pg_try_advisory_xact_lock(tbl_repl._lock_resolve(), lane.server_id::integer);
        waits := CASE WHEN tbl_repl._resolve_lane(lane.target_id, lane.conn, lane.timeout) THEN 2 ELSE 30 END;
        IF NOT always THEN
            PERFORM set_config(setting, (extract(epoch FROM clock_timestamp()) + waits)::text, false);
        END IF;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._resolve_receipts(name, boolean) IS
    'settles what targets have committed and this node may not have';

-- _resolve_lane(target_id, conn, timeout): settles all receipts of this node behind a connection; false: could not.
-- The queue is written without its lock, as under SERIALIZABLE: status is not looked at, and a drainer looks for
-- pending rows also while it is ok.
CREATE OR REPLACE FUNCTION tbl_repl._resolve_lane(target_id integer, conn text, timeout interval)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    node    text := tbl_repl.node_name();
    started timestamptz := clock_timestamp();
    listing json;
    current uuid;
    settled json;
    item    record;
BEGIN
    BEGIN
        PERFORM tbl_repl._connect_alive(target_id, conn, started + timeout);
        listing := tbl_repl._call(conn, format('SELECT coalesce(pg_catalog.json_agg(r), ''[]'') FROM tbl_repl._receipts(%L) AS r', node),
                                  clock_timestamp() + timeout);
    EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
        -- who waits for us to connect cancels us when we hang (see _open)
        IF SQLSTATE = '57014' AND clock_timestamp() < started + timeout THEN
            RAISE;
        END IF;
        RETURN false;
    END;
    IF EXISTS (SELECT FROM tbl_repl.boot AS b WHERE b.cluster <> tbl_repl._cluster()) THEN
        -- promoted, or moved by pg_upgrade
        DELETE FROM tbl_repl.boot;
    END IF;
    current := tbl_repl._boot();
    IF current IS NULL THEN
        RETURN true;  -- in a moment
    END IF;

    -- Those in tbl_repl.doubt have been queued by an earlier call, which has committed; not those that this transaction has
    -- found over another connection to the same database.
    SELECT json_agg(r) INTO settled
    FROM json_to_recordset(listing) AS r (target_id integer, boot uuid, xid xid8)
    WHERE NOT EXISTS (SELECT FROM tbl_repl.target AS t WHERE t.target_id = r.target_id)
       OR EXISTS (SELECT FROM tbl_repl.doubt AS b WHERE b.target_id = r.target_id AND b.xid = r.xid AND b.boot IS NOT DISTINCT FROM r.boot
                                                    AND b.queued_by <> pg_current_xact_id())
       OR (r.boot = current AND tbl_repl._fate(r.xid) = 'committed');
    BEGIN
        IF settled IS NOT NULL THEN
            PERFORM tbl_repl._call(conn, format('SELECT tbl_repl._remove_receipts(%L, %L, %L, %L)', node, array_agg(r.target_id), array_agg(r.boot), array_agg(r.xid)),
                                   clock_timestamp() + timeout)
            FROM json_to_recordset(settled) AS r (target_id integer, boot uuid, xid xid8);
        END IF;
        DELETE FROM tbl_repl.doubt AS b
        WHERE b.queued_by <> pg_current_xact_id() AND b.target_id IN (SELECT o.target_id FROM tbl_repl.target AS t JOIN tbl_repl.target AS o ON o.server = t.server
                              WHERE t.target_id = _resolve_lane.target_id);
        FOR item IN
            SELECT r.target_id, r.boot, r.xid, r.parts, r.whole, r.row_count
            FROM json_to_recordset(listing) AS r (target_id integer, boot uuid, xid xid8, parts integer[], whole boolean, row_count bigint)
            WHERE NOT EXISTS (SELECT FROM json_to_recordset(settled) AS x (target_id integer, boot uuid, xid xid8)
                              WHERE x.target_id = r.target_id AND x.xid = r.xid AND x.boot IS NOT DISTINCT FROM r.boot)
              AND NOT EXISTS (SELECT FROM tbl_repl.doubt AS b WHERE b.target_id = r.target_id AND b.xid = r.xid AND b.boot IS NOT DISTINCT FROM r.boot)
              AND (r.boot IS DISTINCT FROM current OR tbl_repl._fate(r.xid) IS DISTINCT FROM 'in progress')
        LOOP
            CONTINUE WHEN item.boot = current AND tbl_repl._fate(item.xid) = 'committed';  -- just now
            PERFORM tbl_repl._heal(node, conn, timeout, item.target_id, item.boot, item.xid, item.parts, item.whole, item.row_count);
        END LOOP;
    EXCEPTION WHEN assert_failure OR OTHERS THEN
        RETURN false;  -- nothing is forgotten: the receipts that are left are found again
    END;
    RETURN true;
END
$function$;
COMMENT ON FUNCTION tbl_repl._resolve_lane(integer, text, interval) IS
    'settles the receipts of this node on one server; whether it could';

-- What became of a transaction of this run; NULL: nobody knows any more.
CREATE OR REPLACE FUNCTION tbl_repl._fate(xid xid8)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RETURN pg_xact_status(xid);
EXCEPTION WHEN invalid_parameter_value THEN
    RETURN NULL;  -- in the future, says PostgreSQL: this is another cluster
END
$function$;
COMMENT ON FUNCTION tbl_repl._fate(xid8) IS 'what became of a transaction';

-- Queues the keys of a receipt, as an operation that its target takes and that removes what is not here.
-- lock_timeout: foreign keys would wait for who drops the target; the receipt is found again.
CREATE OR REPLACE FUNCTION tbl_repl._heal(
    node      text,
    conn      text,
    timeout   interval,
    target_id integer,
    boot      uuid,
    xid       xid8,
    parts     integer[],
    whole     boolean,
    row_count bigint
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '20ms'
AS $function$
DECLARE
    target tbl_repl.target%ROWTYPE;
    part   integer;
    keys   text[];
BEGIN
    SELECT * INTO STRICT target FROM tbl_repl.target AS t WHERE t.target_id = _heal.target_id;
    FOREACH part IN ARRAY parts LOOP
        keys := tbl_repl._call(conn, format('SELECT tbl_repl._receipt_keys(%L, %s, %L, %L, %s)', node, target_id, boot, xid, part),
                               clock_timestamp() + timeout);
        CONTINUE WHEN keys IS NULL AND NOT whole;  -- settled over another server that leads there
        INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count)
        SELECT h.segment, target.source_id, target.target_id,
               CASE WHEN keys IS NULL THEN 'T' WHEN 'delete' = ANY (target.operations) THEN 'D'
                    WHEN 'update' = ANY (target.operations) THEN 'K' WHEN 'truncate' = ANY (target.operations) THEN 'T'
                    ELSE 'I' END::"char",
               keys, coalesce(cardinality(keys), 1)
        FROM tbl_repl.queue_head AS h;
    END LOOP;
    INSERT INTO tbl_repl.doubt (target_id, boot, xid, row_count) VALUES (target_id, boot, xid, row_count);
    INSERT INTO tbl_repl.error (target_id, sqlstate, message, detail, hint)
    VALUES (target_id, '40003', format('%s rows of the target were in doubt', row_count),
            format('Transaction %s has committed there; here it has not, or nobody knows.', xid),
            CASE WHEN boot = tbl_repl._boot() THEN 'Their present state is queued; nothing is to be done.'
                 ELSE format('Their present state is queued. If this server is a promoted standby, or was restored to an earlier time, more may differ: SELECT * FROM tbl_repl.compare_target(%s);', target_id) END);
    -- the receipt goes when this has committed: that must not be lost in a crash
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'local', true);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._heal(text, text, interval, integer, uuid, xid8, integer[], boolean, bigint) IS
    'queues what a receipt names, and notes that it was in doubt';
