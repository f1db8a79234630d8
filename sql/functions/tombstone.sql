-- Tombstone: versions of deleted rows, for on_conflict => 'newest'.
--
-- Promises that a deleted row is not brought back by an older value, as long as tombstones are kept, and that whoever has been
-- cut off for longer sends nothing.

-- Statements of the capture function that keep the tombstones of a newest table, or NULL.  keys, olds: names of its
-- variables; gone: 'true' after a TRUNCATE.  The state decides, not
-- the event: an application's own trigger may have written the row again already.
CREATE OR REPLACE FUNCTION tbl_repl._bury_sql(source tbl_repl.source, keys text, olds text, gone text)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format($piece$IF current_setting('tbl_repl.settling', true) IS DISTINCT FROM 'on' THEN
        IF %1$s <> TG_RELID AND NOT EXISTS (SELECT FROM pg_partition_ancestors(TG_RELID) AS a (id) WHERE a.id = %1$s) THEN
            PERFORM tbl_repl._refuse_other_table(%9$s, %10$L);
        END IF;
        INSERT INTO tbl_repl.tombstone AS b (local_table, key, version)
        SELECT (%1$s), u.tbl_repl_key, max(%2$s)::text
        FROM unnest(%6$s, %7$s) AS u (tbl_repl_key, old)
        WHERE %8$s OR NOT EXISTS (SELECT FROM %3$s AS s WHERE %4$s)
        GROUP BY u.tbl_repl_key
        ON CONFLICT (local_table, key) DO UPDATE
        SET version = greatest(b.version::%5$s, excluded.version::%5$s)::text, at = clock_timestamp();
        DELETE FROM tbl_repl.tombstone AS b USING unnest(%6$s) AS u (tbl_repl_key)
        WHERE NOT %8$s AND b.local_table = (%1$s) AND b.key = u.tbl_repl_key
          AND EXISTS (SELECT FROM %3$s AS s WHERE %4$s);
    END IF;$piece$,
        -- by name: a restored table has another number; and not from the catalog, which may be newer than the snapshot
        format('%L::regclass', source.source_table),
        CASE v.type WHEN 'timestamptz' THEN 'greatest(u.old::timestamptz, clock_timestamp())' ELSE 'coalesce(u.old::int8, -9223372036854775808)' END,
        source.source_table, tbl_repl._key_match(source.source_table, source.key_columns), v.type, keys, olds, gone, source.source_id, source.source_table)
    FROM (SELECT t.version_column FROM tbl_repl.target AS t
          WHERE t.source_id = source.source_id AND t.on_conflict = 'newest' LIMIT 1) AS t
    JOIN pg_attribute AS a ON a.attrelid = source.source_table AND a.attname = t.version_column
    CROSS JOIN LATERAL (SELECT CASE a.atttypid WHEN 'timestamptz'::regtype THEN 'timestamptz' ELSE 'int8' END) AS v (type)
$function$;
COMMENT ON FUNCTION tbl_repl._bury_sql(tbl_repl.source, text, text, text) IS 'statements that keep the tombstones of a table';

-- No sequential scans: the plan may be older than the tombstones.
CREATE OR REPLACE FUNCTION tbl_repl._buried(local_table regclass, key text, locks boolean DEFAULT true)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $function$
BEGIN
    IF locks THEN
        RETURN (SELECT b.version FROM tbl_repl.tombstone AS b WHERE b.local_table = _buried.local_table AND b.key = _buried.key FOR UPDATE);
    END IF;
    RETURN (SELECT b.version FROM tbl_repl.tombstone AS b WHERE b.local_table = _buried.local_table AND b.key = _buried.key);
END
$function$;
COMMENT ON FUNCTION tbl_repl._buried(regclass, text, boolean) IS 'version of a deleted row, NULL: none is known; locks its tombstone if told to';

-- Where there is neither row nor tombstone, two that settle values of one key have nothing in common to wait for: so
-- who writes the row makes a tombstone of no version ('') first, and removes it again (_unbury).
CREATE OR REPLACE FUNCTION tbl_repl._lock_grave(local_table regclass, key text)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    found_version text;
BEGIN
    INSERT INTO tbl_repl.tombstone AS b (local_table, key, version) VALUES (local_table, key, '')
    ON CONFLICT ON CONSTRAINT tombstone_pkey DO UPDATE SET at = b.at
    RETURNING b.version INTO found_version;
    RETURN nullif(found_version, '');
END
$function$;
COMMENT ON FUNCTION tbl_repl._lock_grave(regclass, text) IS
    'version of a deleted row, NULL: none is known; others that settle this key wait from now on';

CREATE OR REPLACE FUNCTION tbl_repl._unbury(local_table regclass, key text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $function$
BEGIN
    DELETE FROM tbl_repl.tombstone AS b WHERE b.local_table = _unbury.local_table AND b.key = _unbury.key;
END
$function$;
COMMENT ON FUNCTION tbl_repl._unbury(regclass, text) IS 'forgets that a row was deleted';

-- A tombstone may go when no older value can come any more.  Nobody knows what a node that is cut off still has queued:
-- so they are kept for long, and a node that has been cut off for longer sends nothing (_cut_off_too_long).
CREATE OR REPLACE FUNCTION tbl_repl._tombstone_retention() RETURNS interval
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN interval '30 days';
COMMENT ON FUNCTION tbl_repl._tombstone_retention() IS 'how long versions of deleted rows are kept';

-- Those that a target of this node has not got yet are kept longer.  Called by every replay and now and then by who settles
-- values: some nodes only send, others only take, and mostly there is none.  SKIP LOCKED: others clear up the same rows, to their commit.
CREATE OR REPLACE FUNCTION tbl_repl._purge_tombstones()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF EXISTS (SELECT FROM tbl_repl.tombstone AS b WHERE b.at < clock_timestamp() - tbl_repl._tombstone_retention()) THEN
        DELETE FROM tbl_repl.tombstone AS b
        WHERE b.ctid = ANY (ARRAY(
            SELECT x.ctid FROM tbl_repl.tombstone AS x
            WHERE x.at < clock_timestamp() - tbl_repl._tombstone_retention()
              AND x.local_table NOT IN (SELECT s.source_table FROM tbl_repl.source AS s JOIN tbl_repl.target AS t USING (source_id)
                                        WHERE t.on_conflict = 'newest' AND tbl_repl._has_pending(t.target_id))
            ORDER BY x.at LIMIT 10000 FOR UPDATE SKIP LOCKED));
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._purge_tombstones() IS 'removes versions of deleted rows that nobody needs any more';

-- Marks targets as failed that would bring back rows whose tombstones are gone by now; returns the others.
CREATE OR REPLACE FUNCTION tbl_repl._cut_off_too_long(targets integer[])
RETURNS integer[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item record;
BEGIN
    FOR item IN
        SELECT t.target_id, p.oldest
        FROM tbl_repl.target AS t CROSS JOIN LATERAL tbl_repl._pending_rows(t.target_id) AS p
        WHERE t.target_id = ANY (targets) AND t.on_conflict = 'newest' AND p.oldest < clock_timestamp() - tbl_repl._tombstone_retention()
    LOOP
        targets := array_remove(targets, item.target_id);
        PERFORM tbl_repl._log_error(item.target_id, NULL, '55000', format('cut off since %s, longer than deleted rows are remembered', item.oldest), NULL,
                                    'What is queued could bring back rows that were deleted there. Drop the targets between the two nodes on both sides, '
                                    'empty the table on the node that was cut off, and add them again.', NULL);
        UPDATE tbl_repl.target_state AS st SET status = 'failed' WHERE st.target_id = item.target_id;
    END LOOP;
    RETURN nullif(targets, '{}');
END
$function$;
COMMENT ON FUNCTION tbl_repl._cut_off_too_long(integer[]) IS
    'marks newest targets as failed whose backlog is older than the tombstones; returns the others';

-- Without targets under newest nobody keeps the tombstones of a table: what was deleted by then says nothing about rows that
-- come later.
CREATE OR REPLACE FUNCTION tbl_repl._forget_tombstones(source_id integer)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    DELETE FROM tbl_repl.tombstone AS b USING tbl_repl.source AS s
    WHERE s.source_id = _forget_tombstones.source_id AND b.local_table = s.source_table
      AND NOT EXISTS (SELECT FROM tbl_repl.target AS t JOIN tbl_repl.source AS o USING (source_id)
                      WHERE o.source_table = s.source_table AND t.on_conflict = 'newest')
$function$;
COMMENT ON FUNCTION tbl_repl._forget_tombstones(integer) IS 'removes the tombstones of a table that has no target under newest any more';

-- A copy sends rows; what was deleted here may have come to the target from elsewhere, so it has to be told as well.
CREATE OR REPLACE FUNCTION tbl_repl._queue_tombstones(target tbl_repl.target)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count)
    SELECT h.segment, target.source_id, target.target_id, 'D', array_agg(k.key), count(*)
    FROM tbl_repl.queue_head AS h,
         (SELECT b.key, row_number() OVER () AS n FROM tbl_repl.tombstone AS b JOIN tbl_repl.source AS s ON s.source_table = b.local_table
          WHERE s.source_id = target.source_id) AS k
    GROUP BY h.segment, k.n / 10000
$function$;
COMMENT ON FUNCTION tbl_repl._queue_tombstones(tbl_repl.target) IS 'queues the deleted rows that are remembered, for a new target';
