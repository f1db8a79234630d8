-- Monitor: the views in which users and monitoring systems read what is going on.

-- A row of the queue is for every target of its source; what a target does not replicate is not pending for it.
CREATE OR REPLACE FUNCTION tbl_repl._wanted(target tbl_repl.target)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format(' AND c.op = ANY (%L)%s',
                  array_remove(ARRAY[CASE WHEN 'insert' = ANY (target.operations) THEN 'I' END,
                                     CASE WHEN 'update' = ANY (target.operations) THEN 'U' END,
                                     CASE WHEN 'update' = ANY (target.operations) THEN 'K' END,
                                     CASE WHEN 'delete' = ANY (target.operations) THEN 'D' END,
                                     CASE WHEN 'truncate' = ANY (target.operations) THEN 'T' END,
                                     CASE WHEN target.on_conflict = 'newest' THEN 'B' END], NULL),
                  CASE WHEN tbl_repl._truncates_by_key(target.target_id) THEN ' AND (c.op <> ''T'' OR c.keys IS NOT NULL)' END)
$function$;
COMMENT ON FUNCTION tbl_repl._wanted(tbl_repl.target) IS
    'SQL condition: what row c of the queue means concerns the target';

CREATE OR REPLACE FUNCTION tbl_repl._pending_rows(
    target_id integer,
    OUT rows   bigint,
    OUT oldest timestamptz
)
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    query text;
BEGIN
    SELECT format('SELECT coalesce(sum(c.row_count), 0), min(c.captured_at) FROM %s%s', tbl_repl._pending_from(t, tbl_repl._position(t.target_id)), tbl_repl._wanted(t))
    INTO query FROM tbl_repl.target AS t WHERE t.target_id = _pending_rows.target_id;
    IF query IS NULL THEN
        rows := 0;  -- dropped a moment ago
        RETURN;
    END IF;
    EXECUTE query INTO rows, oldest;
    -- rows still to be copied in the background: an estimate
    rows := rows + coalesce((
        SELECT greatest(1, sum(c.reltuples)::bigint - st.rows_copied)
        FROM tbl_repl.target AS t JOIN tbl_repl.target_state AS st USING (target_id) JOIN tbl_repl.source AS s USING (source_id)
        CROSS JOIN LATERAL (SELECT s.source_table AS relid UNION SELECT p.relid FROM pg_partition_tree(s.source_table) AS p) AS p
        JOIN pg_class AS c ON c.oid = p.relid
        WHERE t.target_id = _pending_rows.target_id AND st.copy_after IS NOT NULL
        GROUP BY st.rows_copied), 0);
END
$function$;
COMMENT ON FUNCTION tbl_repl._pending_rows(integer) IS
    'number and age of the changed rows queued for a target; SECURITY DEFINER, for readers of the views';

CREATE OR REPLACE VIEW tbl_repl.target_status AS
SELECT t.target_id,
       s.source_table,
       t.server,
       format('%I.%I', t.dst_schema, t.dst_name) AS dst_table,
       t.mode,
       CASE WHEN st.status = 'ok' AND t.mode <> 'async' AND p.rows > 0 THEN 'queueing' ELSE st.status END AS status,
       p.rows AS pending_rows,
       p.oldest AS oldest_pending_at,
       st.last_error,
       st.last_error_at,
       greatest(g.shipped_at, d.shipped_at) AS last_shipped_at,
       g.rows + coalesce(d.rows, 0) AS rows_shipped,
       st.next_try_at,
       (SELECT coalesce(sum(b.row_count), 0)::bigint FROM tbl_repl.doubt AS b WHERE b.target_id = t.target_id) AS in_doubt
FROM tbl_repl.target AS t
JOIN tbl_repl.target_state AS st USING (target_id)
JOIN tbl_repl.progress AS g USING (target_id)
JOIN tbl_repl.source AS s USING (source_id)
LEFT JOIN LATERAL (SELECT sum(x.rows)::bigint AS rows, max(x.shipped_at) AS shipped_at
                   FROM tbl_repl.shipped AS x WHERE x.target_id = t.target_id) AS d ON true
CROSS JOIN LATERAL tbl_repl._pending_rows(t.target_id) AS p;
COMMENT ON VIEW tbl_repl.target_status IS 'every target, its state and what is queued for it';

CREATE OR REPLACE FUNCTION tbl_repl._pending_keys(only_direct boolean)
RETURNS TABLE (target_id integer, source_table regclass, op text, key jsonb, captured_at timestamptz, key_text text, txid xid8, removes boolean)
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item record;
BEGIN
    FOR item IN
        SELECT t.target_id, s.source_table, s.key_columns, tbl_repl._pending_from(t, tbl_repl._position(t.target_id)) || tbl_repl._wanted(t) AS pending
        FROM tbl_repl.target AS t JOIN tbl_repl.source AS s USING (source_id)
        WHERE t.mode <> 'async' OR NOT only_direct
        ORDER BY t.target_id
    LOOP
        RETURN QUERY EXECUTE format($query$
            SELECT %s, %L::regclass,
                   CASE c.op WHEN 'I' THEN 'insert' WHEN 'U' THEN 'update' WHEN 'K' THEN 'update' WHEN 'B' THEN 'update' WHEN 'D' THEN 'delete' ELSE 'truncate' END,
                   %s, c.captured_at, k.key, c.txid, c.op IN ('K', 'D', 'T')
            FROM (SELECT c.* FROM %s) AS c LEFT JOIN LATERAL unnest(c.keys) WITH ORDINALITY AS k (key, n) ON true
            ORDER BY c.captured_at, k.n$query$, item.target_id, item.source_table::oid,
            tbl_repl._key_json_sql(item.source_table, item.key_columns), item.pending);
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._pending_keys(boolean) IS
    'every key that is queued for a target; SECURITY DEFINER, for readers of the views';

CREATE OR REPLACE VIEW tbl_repl.pending AS
SELECT p.target_id, p.source_table, p.op, p.key, p.captured_at FROM tbl_repl._pending_keys(false) AS p;
COMMENT ON VIEW tbl_repl.pending IS 'the rows queued for each target, oldest first';

CREATE OR REPLACE VIEW tbl_repl.error_log AS
SELECT e.at, e.target_id, tbl_repl._key_json(s.source_table, s.key_columns, e.key) AS key,
       e.sqlstate, e.message, e.detail, e.hint, e.statement
FROM tbl_repl.error AS e
JOIN tbl_repl.target AS t USING (target_id)
JOIN tbl_repl.source AS s USING (source_id);
COMMENT ON VIEW tbl_repl.error_log IS 'what targets have answered instead of success';

CREATE OR REPLACE VIEW tbl_repl.quarantine AS
SELECT q.target_id, tbl_repl._key_json(s.source_table, s.key_columns, q.key) AS key,
       q.attempts, q.sqlstate, q.message, q.first_failed_at, q.last_failed_at
FROM tbl_repl.quarantined AS q
JOIN tbl_repl.target AS t USING (target_id)
JOIN tbl_repl.source AS s USING (source_id);
COMMENT ON VIEW tbl_repl.quarantine IS 'rows that a target rejects, with its reason';

CREATE OR REPLACE VIEW tbl_repl.conflict_log AS
SELECT c.at, c.target_id, c.local_table, c.key, c.conflict_type, c.origin, c.local_version, c.remote_version, c.resolution
FROM tbl_repl.conflict AS c;
COMMENT ON VIEW tbl_repl.conflict_log IS 'conflicts between nodes that were settled here';

-- Rows of the table are in it: it is for operators.
-- SECURITY DEFINER: an operator himself may call render_N of his own targets only.
CREATE OR REPLACE FUNCTION tbl_repl._pending_sql()
RETURNS TABLE (id bigint, nsp_name name, table_name name, dst_server name, dst_query text, create_time timestamptz)
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item     record;
    rendered record;
BEGIN
    id := 0;
    FOR item IN
        SELECT p.target_id, p.key_text, p.captured_at, p.op, t.server, n.nspname, c.relname, tbl_repl._dst_table(t) AS dst_table,
               'delete' = ANY (t.operations) OR p.removes AS absent
        FROM tbl_repl._pending_keys(true) AS p
        JOIN tbl_repl.target AS t ON t.target_id = p.target_id
        JOIN pg_class AS c ON c.oid = p.source_table JOIN pg_namespace AS n ON n.oid = c.relnamespace
        ORDER BY p.captured_at, p.target_id
    LOOP
        nsp_name := item.nspname;
        table_name := item.relname;
        dst_server := item.server;
        create_time := item.captured_at;
        FOR dst_query IN
            SELECT format('TRUNCATE %s', item.dst_table) WHERE item.key_text IS NULL
        LOOP
            id := id + 1;
            RETURN NEXT;
        END LOOP;
        CONTINUE WHEN item.key_text IS NULL;
        BEGIN
            EXECUTE format('SELECT * FROM tbl_repl.render_%s($1, false, $2, ''plain'')', item.target_id)
            INTO rendered USING ARRAY[item.key_text], item.absent;
            dst_query := concat_ws('; ', rendered.deletes, rendered.upserts);
        EXCEPTION WHEN assert_failure OR OTHERS THEN
            -- one definition that does not fit its table any more must not hide what is queued for the others
            dst_query := format('-- target %s: %s', item.target_id, replace(SQLERRM, E'\n', ' '));
        END;
        IF dst_query <> '' THEN
            id := id + 1;
            RETURN NEXT;
        END IF;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._pending_sql() IS 'what is queued for direct targets, as the SQL that a replay will run';

CREATE OR REPLACE VIEW tbl_repl.sync_err_rec AS
SELECT p.id, p.nsp_name, p.table_name, p.dst_server, p.dst_query, p.create_time FROM tbl_repl._pending_sql() AS p;
COMMENT ON VIEW tbl_repl.sync_err_rec IS 'what is queued after an error, as the SQL that a replay will run';

-- Who drops the target, or gives it another dst_table, holds the row that the foreign key looks at, to his commit: neither
-- waiting for him nor failing is worth a line in the log.  Not by SKIP LOCKED: row security hides targets of others from operators there.
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
SET lock_timeout = '20ms'
AS $function$
DECLARE
    -- who is not let in is told so in the detail only
    why text := CASE WHEN code ~ '^08' THEN nullif(btrim(regexp_replace(detail, E'\\s+', ' ', 'g')), '') END;
BEGIN
    BEGIN
        INSERT INTO tbl_repl.error (target_id, key, sqlstate, message, detail, hint, statement)
        VALUES (target_id, key, code, message, nullif(detail, ''), nullif(hint, ''), left(statement, 10000));
    EXCEPTION WHEN lock_not_available OR foreign_key_violation OR serialization_failure THEN
        NULL;
    END;
    -- One call in sixteen clears up, for it looks at a thousand rows: by the clock, for random() is the application's.
    IF extract(microseconds FROM clock_timestamp())::integer % 16 = 0 THEN
        PERFORM tbl_repl._trim_errors(target_id);
    END IF;
    BEGIN
        UPDATE tbl_repl.target_state AS st SET last_error = format('%s: %s', code, concat_ws(': ', message, why)), last_error_at = clock_timestamp()
        WHERE st.target_id IN (SELECT l.target_id FROM tbl_repl.target_state AS l
                               WHERE l.target_id = _log_error.target_id
                                 -- that another session is still trying to connect says less than why that is so
                                 AND NOT (code = '55P03' AND l.status <> 'ok' AND coalesce(l.last_error ~ '^08', false)) FOR UPDATE SKIP LOCKED);
    EXCEPTION WHEN lock_not_available OR serialization_failure THEN
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
