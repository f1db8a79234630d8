-- Conflict: several nodes that write the same table.
--
-- Promises that a change goes round no loop, that a policy settles each conflict row by row where it is met, and that
-- under newest all nodes end with the same row, whatever the order in which values meet.  A target with another policy
-- than overwrite is not sent INSERT and DELETE but values, as arguments of _settle, which runs on the target and
-- compares them with what is there.  Needs the extension there.
--
-- Why newest converges.  A key's value is its row, or its tombstone where it is deleted.  Values are ordered: by
-- version, then tombstone over row, then by the row's own text; every node decides alike.  A node keeps the greater one;
-- who refuses a value queues its own for all its targets, so no node is left with a smaller one.  Rows are locked
-- before tombstones, everywhere; and who has waited for a row looks at the tombstone once more.

-- _remote_node(conn, deadline): what the extension on the target says of itself: {node, system, database, started,
-- settles}; {} where there is none, or the role may not ask.
CREATE OR REPLACE FUNCTION tbl_repl._remote_node(conn text, deadline timestamptz)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF tbl_repl._call(conn, $remote$
            SELECT pg_catalog.count(*) FROM pg_catalog.pg_namespace AS n JOIN pg_catalog.pg_proc AS f ON f.pronamespace = n.oid
            WHERE n.nspname = 'tbl_repl' AND f.proname = 'node_name' AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
              AND pg_catalog.has_function_privilege(f.oid, 'EXECUTE')$remote$, deadline) = '0' THEN
        RETURN '{}';
    END IF;
    RETURN tbl_repl._call(conn, $remote$
        SELECT pg_catalog.jsonb_build_object('node', tbl_repl.node_name(), 'system', s.system_identifier::text,
            'database', pg_catalog.current_database(), 'started', extract(epoch FROM pg_catalog.pg_postmaster_start_time())::text,
            'settles', coalesce((SELECT pg_catalog.bool_or(pg_catalog.has_function_privilege(f.oid, 'EXECUTE')) FROM pg_catalog.pg_proc AS f
                                 JOIN pg_catalog.pg_namespace AS n ON n.oid = f.pronamespace
                                 WHERE n.nspname = 'tbl_repl' AND f.proname = '_settle'), false))
        FROM pg_catalog.pg_control_system() AS s$remote$, deadline)::jsonb;
END
$function$;
COMMENT ON FUNCTION tbl_repl._remote_node(text, timestamptz) IS
    'name of the target''s node, and whether this role may have it settle conflicts';

-- Two nodes of one name would take each other's changes for their own.  A physical copy of a cluster has its identifier,
-- too, but was started at another time.
CREATE OR REPLACE FUNCTION tbl_repl._check_node(remote jsonb)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF remote ->> 'node' = tbl_repl.node_name()
       AND (remote ->> 'system', remote ->> 'database', remote ->> 'started') IS DISTINCT FROM
           ((SELECT c.system_identifier::text FROM pg_control_system() AS c), current_database()::text,
            extract(epoch FROM pg_postmaster_start_time())::text) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('the target has the name of this node: %s', remote ->> 'node'),
            DETAIL  = 'Changes carry the name of the node where they were made, so that they do not come back.',
            HINT    = 'Give one of them another name: SELECT tbl_repl.set_node_name(''...'');';
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_node(jsonb) IS 'refuses a target with the name of this node (55000)';

-- _check_policy(target, source): what a conflict policy needs.  Errors: 22023, 42703, 0A000, 55000.
CREATE OR REPLACE FUNCTION tbl_repl._check_policy(target tbl_repl.target, source tbl_repl.source)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    version_type oid;
    others       record;
BEGIN
    IF target.version_column IS NOT NULL THEN
        SELECT a.atttypid INTO version_type FROM pg_attribute AS a
        WHERE a.attrelid = source.source_table AND a.attname = target.version_column AND a.attnum > 0 AND NOT a.attisdropped;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING
                ERRCODE = 'undefined_column',
                MESSAGE = format('column %I of table %s does not exist', target.version_column, source.source_table),
                HINT    = 'version_column names a column of the source table.';
        ELSIF version_type NOT IN ('timestamptz'::regtype, 'int8'::regtype) THEN
            RAISE EXCEPTION USING
                ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('version column %I is of type %s', target.version_column, format_type(version_type, -1)),
                HINT    = 'Use a column of type timestamptz or bigint that grows with every change.';
        END IF;
    END IF;
    IF target.forward = 'any' AND (target.remote ->> 'extension')::boolean AND target.remote ->> 'node' IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role %I may not ask the target for the name of its node', target.remote ->> 'user'),
            DETAIL  = 'With forward => ''any'' a change must not go back to the node where it was made.',
            HINT    = format('There: SELECT tbl_repl.grant_access(%L, ''reader'');', quote_ident(target.remote ->> 'user'));
    ELSIF target.on_conflict = 'overwrite' THEN
        RETURN;
    ELSIF NOT (target.remote ->> 'extension')::boolean THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('on_conflict => %L needs tbl_repl on the target', target.on_conflict),
            DETAIL  = 'Conflicts are settled there, beside the row.',
            HINT    = 'There: CREATE EXTENSION tbl_repl CASCADE;';
    ELSIF NOT coalesce((target.remote ->> 'settles')::boolean, false) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role %I may not settle conflicts on the target', target.remote ->> 'user'),
            HINT    = format('There: SELECT tbl_repl.grant_access(%L, ''operator'');', quote_ident(target.remote ->> 'user'));
    ELSIF NOT tbl_repl._has_exact_key(source.source_table, source.key_columns) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = format('on_conflict => %L needs a key whose equal values look alike', target.on_conflict),
            DETAIL  = '1.0 and 1.00 are one key of type numeric.',
            HINT    = 'Use a key of integers, text, uuid or the like.';
    ELSIF cardinality(tbl_repl._always_columns(target)) > 0 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = format('on_conflict => %L needs columns that can be updated', target.on_conflict),
            DETAIL  = 'An identity column GENERATED ALWAYS on the target, outside the key, would keep its own value.',
            HINT    = 'There: ALTER TABLE ... ALTER COLUMN ... SET GENERATED BY DEFAULT; or leave it out by columns.';
    ELSIF target.on_conflict = 'newest' AND target.version_column IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'on_conflict => ''newest'' needs version_column',
            HINT    = 'Name a column of type timestamptz or bigint that grows with every change.';
    ELSIF target.on_conflict = 'newest'
          AND (target.row_filter IS NOT NULL OR target.column_map IS NOT NULL OR NOT target.operations @> '{insert,update,delete,truncate}'
               OR EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = source.source_table AND a.attnum > 0 AND NOT a.attisdropped
                          AND a.attgenerated = '' AND a.attname <> ALL (target.sent_columns))) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = 'on_conflict => ''newest'' needs whole rows',
            DETAIL  = 'All nodes have to compare the same values.',
            HINT    = 'Leave columns, column_map, row_filter and operations at their defaults.';
    END IF;
    SELECT o.target_id, o.on_conflict INTO others
    FROM tbl_repl.target AS o
    WHERE o.source_id = target.source_id AND o.target_id IS DISTINCT FROM target.target_id AND o.on_conflict <> 'overwrite'
      AND (o.on_conflict = 'newest') <> (target.on_conflict = 'newest')
       OR o.source_id = target.source_id AND o.target_id IS DISTINCT FROM target.target_id AND o.on_conflict <> 'overwrite'
      AND tbl_repl._old_value_sql(o) <> tbl_repl._old_value_sql(target)
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = format('target %s of the same table has on_conflict => %L', others.target_id, others.on_conflict),
            DETAIL  = 'What capture keeps of the old row serves one policy, one set of columns and one version column.',
            HINT    = 'Use the same policy, columns, map and version column for all targets of the table, or overwrite.';
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_policy(tbl_repl.target, tbl_repl.source) IS
    'refuses a conflict policy that cannot work';

-- The text of a whole row s as sent, columns in order of their names there: the same on every node.
CREATE OR REPLACE FUNCTION tbl_repl._row_text_sql(target tbl_repl.target)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('array_to_string(ARRAY[%s], '','')',
                  (SELECT string_agg(format('quote_nullable((%s)::text)', x.expr), ', ' ORDER BY x.name::text COLLATE "C")
                   FROM unnest(target.sent_columns, target.sent_exprs) AS x (name, expr)))
$function$;
COMMENT ON FUNCTION tbl_repl._row_text_sql(tbl_repl.target) IS 'SQL expression: row s as the target has it, as one text';

-- What capture keeps of an old row s: its version (newest), or a digest of what the target should have, '' for
-- nothing (keep, error).  NULL: nothing is kept.
CREATE OR REPLACE FUNCTION tbl_repl._old_value_sql(target tbl_repl.target)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE target.on_conflict
               WHEN 'overwrite' THEN NULL
               WHEN 'newest' THEN format('s.%I::text', target.version_column)
               ELSE format(CASE WHEN target.filter_expr IS NULL THEN 'md5(%1$s)' ELSE 'CASE WHEN %2$s THEN md5(%1$s) ELSE '''' END' END,
                           tbl_repl._row_text_sql(target), target.filter_expr) END
$function$;
COMMENT ON FUNCTION tbl_repl._old_value_sql(tbl_repl.target) IS 'SQL expression: what capture keeps of an old row';

-- Statements of the capture function that keep the tombstones of a newest table, or NULL.  keys, olds: names of its
-- variables; gone: 'true' after a TRUNCATE.  The state decides, not
-- the event: an application's own trigger may have written the row again already.
CREATE OR REPLACE FUNCTION tbl_repl._bury_sql(source tbl_repl.source, keys text, olds text, gone text)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format($piece$IF current_setting('tbl_repl.settling', true) IS DISTINCT FROM 'on' THEN
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
        source.source_table, tbl_repl._key_match(source.source_table, source.key_columns), v.type, keys, olds, gone)
    FROM (SELECT t.version_column FROM tbl_repl.target AS t
          WHERE t.source_id = source.source_id AND t.on_conflict = 'newest' LIMIT 1) AS t
    JOIN pg_attribute AS a ON a.attrelid = source.source_table AND a.attname = t.version_column
    CROSS JOIN LATERAL (SELECT CASE a.atttypid WHEN 'timestamptz'::regtype THEN 'timestamptz' ELSE 'int8' END) AS v (type)
$function$;
COMMENT ON FUNCTION tbl_repl._bury_sql(tbl_repl.source, text, text, text) IS 'statements that keep the tombstones of a table';

-- What an applier has changed in a table that is replicated from here, too: it is carried on to the targets
-- that take any origin, always by the queue; and it may have met a change made here.
-- SECURITY DEFINER: called by the capture function on behalf of any applier.
CREATE OR REPLACE FUNCTION tbl_repl._capture_carried(
    source_id integer,
    op        "char",
    keys      text[],
    origin    text,
    olds      text[] DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF keys IS NULL THEN
        RETURN;  -- TRUNCATE: targets that take any origin have got its keys before
    END IF;
    IF current_setting('tbl_repl.settling', true) IS DISTINCT FROM 'on' THEN
        IF (SELECT s.capture = 'row' FROM tbl_repl.source AS s WHERE s.source_id = _capture_carried.source_id)
           AND current_setting('transaction_isolation') <> 'serializable' THEN
            -- row by row the backlog would be searched too often: at commit, for all of them
            INSERT INTO tbl_repl.stash (source_id, op, keys, row_count, olds) VALUES (source_id, 'N', keys, 0, ARRAY[op::text, origin]);
            INSERT INTO tbl_repl.flush DEFAULT VALUES ON CONFLICT DO NOTHING;
        ELSE
            PERFORM tbl_repl._note_conflicts(source_id, op, keys, origin);
        END IF;
    END IF;
    INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count, origin, olds)
    SELECT h.segment, _capture_carried.source_id, x.target_id, _capture_carried.op, _capture_carried.keys,
           cardinality(_capture_carried.keys), _capture_carried.origin, _capture_carried.olds
    FROM tbl_repl.queue_head AS h,
         (SELECT DISTINCT CASE WHEN t.mode <> 'async' THEN t.target_id END AS target_id
          FROM tbl_repl.target AS t
          WHERE t.source_id = _capture_carried.source_id AND t.forward = 'any'
            AND t.remote ->> 'node' IS DISTINCT FROM _capture_carried.origin) AS x;
    IF FOUND THEN
        PERFORM tbl_repl._wake_worker(source_id);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._capture_carried(integer, "char", text[], text, text[]) IS
    'captures what an applier has changed; SECURITY DEFINER, for appliers have no right here';

-- The worker sleeps: the flush wakes it (not at once: PREPARE TRANSACTION refuses what has notified).
CREATE OR REPLACE FUNCTION tbl_repl._wake_worker(source_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(tbl_repl._lock_sleep(), 0) AND current_setting('transaction_isolation') <> 'serializable' THEN
        INSERT INTO tbl_repl.stash (source_id, op, row_count) VALUES (source_id, 'W', 0);
        INSERT INTO tbl_repl.flush DEFAULT VALUES ON CONFLICT DO NOTHING;
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._wake_worker(integer) IS 'sees to it that a sleeping worker wakes at commit';

-- Keys among those given that were changed here, and not yet shipped to the node named (or to those between it and this
-- one): what an arriving change of them is in conflict with.  A long backlog is not searched: that would cost more than
-- it tells.
CREATE OR REPLACE FUNCTION tbl_repl._changed_here(local_table regclass, keys text[], origin text)
RETURNS TABLE (key text, op "char")
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
#variable_conflict use_column
DECLARE
    item record;
BEGIN
    -- SECURITY DEFINER: called on behalf of any applier
    FOR item IN
        SELECT tbl_repl._pending_from(t, tbl_repl._position(t.target_id)) AS pending
        FROM tbl_repl.source AS s JOIN tbl_repl.target AS t USING (source_id)
        WHERE s.source_table = local_table AND origin IS NOT NULL
          AND (t.remote ->> 'node' = origin
               OR NOT EXISTS (SELECT FROM tbl_repl.target AS o WHERE o.source_id = t.source_id AND o.remote ->> 'node' = origin))
    LOOP
        RETURN QUERY EXECUTE format(
            'SELECT DISTINCT ON (k.key) k.key, q.op FROM (SELECT p.*, sum(p.row_count) OVER (ORDER BY p.txid, p.captured_at) AS n '
            'FROM (SELECT c.txid, c.op, c.keys, c.row_count, c.captured_at FROM %s AND c.origin IS NULL AND c.op <> ''B'' LIMIT 10000) AS p) AS q '
            'CROSS JOIN LATERAL unnest(q.keys) AS k (key) WHERE q.n <= 100000 AND k.key = ANY ($1) ORDER BY k.key, q.captured_at DESC', item.pending)
        USING keys;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._changed_here(regclass, text[], text) IS
    'keys with a change made here that a node has not got yet; SECURITY DEFINER, for appliers have no right here';

CREATE OR REPLACE FUNCTION tbl_repl._note_conflicts(
    source_id integer,
    op        "char",
    keys      text[],
    origin    text
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    INSERT INTO tbl_repl.conflict (target_id, local_table, key, conflict_type, origin, resolution)
    SELECT (SELECT min(t.target_id) FROM tbl_repl.target AS t WHERE t.source_id = s.source_id AND t.remote ->> 'node' = _note_conflicts.origin),
           s.source_table, tbl_repl._key_json(s.source_table, s.key_columns, h.key),
           CASE WHEN _note_conflicts.op = 'I' AND h.op IN ('D', 'K', 'T') THEN 'update_missing'
                WHEN h.op = 'I' THEN 'insert_exists'
                WHEN _note_conflicts.op = 'U' THEN 'update_origin_differs'
                ELSE 'delete_origin_differs' END,
           _note_conflicts.origin, 'applied'
    FROM tbl_repl.source AS s
    CROSS JOIN LATERAL tbl_repl._changed_here(s.source_table, _note_conflicts.keys, _note_conflicts.origin) AS h
    WHERE s.source_id = _note_conflicts.source_id AND _note_conflicts.op <> 'K';
    IF FOUND THEN
        PERFORM tbl_repl._trim_conflicts();
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._note_conflicts(integer, "char", text[], text) IS
    'notes that an applier has overwritten what was changed here';

CREATE OR REPLACE FUNCTION tbl_repl._note_carried(own xid8)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT tbl_repl._note_conflicts(n.source_id, n.olds[1]::"char", n.keys, n.olds[2])
    FROM (SELECT s.source_id, s.olds, array_agg(s.keys[1] ORDER BY s.keys[1]) AS keys
          FROM tbl_repl.stash AS s WHERE s.txid = own AND s.op = 'N' GROUP BY s.source_id, s.olds) AS n
$function$;
COMMENT ON FUNCTION tbl_repl._note_carried(xid8) IS
    '_note_conflicts for what a transaction has changed row by row';

-- A tombstone may go when no older value can come any more.  Nobody knows what a node that is cut off still has queued:
-- so they are kept for long, and a node that has been cut off for longer sends nothing (_cut_off_too_long).
CREATE OR REPLACE FUNCTION tbl_repl._tombstone_retention() RETURNS interval
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN interval '30 days';
COMMENT ON FUNCTION tbl_repl._tombstone_retention() IS 'how long versions of deleted rows are kept';

-- Who notes conflicts also forgets old ones, a few at a time: as long as tombstones are kept.  A node that only takes
-- values never replays.  SKIP LOCKED: who notes some beside us clears up the same rows, to its commit.
CREATE OR REPLACE FUNCTION tbl_repl._trim_conflicts()
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    DELETE FROM tbl_repl.conflict AS c
    WHERE c.ctid = ANY (ARRAY(SELECT x.ctid FROM tbl_repl.conflict AS x WHERE x.at < clock_timestamp() - tbl_repl._tombstone_retention()
                              ORDER BY x.at LIMIT 2000 FOR UPDATE SKIP LOCKED))
$function$;
COMMENT ON FUNCTION tbl_repl._trim_conflicts() IS 'forgets conflicts that were settled long ago';

-- Queues keys of a table for all its targets as if they had been written here: what was refused is answered by what
-- is here.  SECURITY DEFINER: called on behalf of any applier.
CREATE OR REPLACE FUNCTION tbl_repl._send_back(local_table regclass, keys text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    found_id integer;
BEGIN
    FOR found_id IN SELECT s.source_id FROM tbl_repl.source AS s WHERE s.source_table = local_table ORDER BY 1 LOOP
        INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count)
        SELECT h.segment, found_id, x.target_id, 'B', _send_back.keys, cardinality(_send_back.keys)
        FROM tbl_repl.queue_head AS h,
             (SELECT DISTINCT CASE WHEN t.mode <> 'async' THEN t.target_id END AS target_id
              FROM tbl_repl.target AS t WHERE t.source_id = found_id AND t.on_conflict = 'newest') AS x;
        PERFORM tbl_repl._wake_worker(found_id);
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._send_back(regclass, text[]) IS
    'queues what is here in answer to values that were refused; SECURITY DEFINER, for appliers have no right here';

-- _expected(target_id, keys): for keep and error: digests of what the source has known on the target, '' for no row,
-- as kept by the changes that are being shipped, or in quarantine; NULL: whatever is there, for rows that a person has
-- queued.  Keys that are not queued (a copy) are expected to be absent.  Who deletes a row there that was in conflict
-- settles it; not so where the conflict was that it had been deleted, which the message says.
-- SECURITY DEFINER: render_N runs as the target's owner.
CREATE OR REPLACE FUNCTION tbl_repl._expected(target_id integer, keys text[])
RETURNS TABLE (key text, digests text[])
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
#variable_conflict use_column
BEGIN
    RETURN QUERY EXECUTE (
        SELECT format($query$
            SELECT u.key, CASE WHEN bool_or(x.known AND x.digest IS NULL) THEN NULL ELSE coalesce(array_agg(DISTINCT x.digest) FILTER (WHERE x.known), '{""}') END
            FROM unnest($1) AS u (key)
            LEFT JOIN (
                SELECT true AS known, k.key, CASE WHEN c.olds IS NOT NULL THEN k.old END AS digest
                FROM (SELECT c.keys, c.olds FROM %s
                      UNION ALL
                      SELECT s.keys, s.olds FROM tbl_repl.stash AS s
                      WHERE s.txid = pg_current_xact_id_if_assigned() AND s.source_id = %s AND s.keys IS NOT NULL AND s.op <> 'N') AS c
                CROSS JOIN LATERAL unnest(c.keys, c.olds) AS k (key, old)
                WHERE k.key = ANY ($1)
                UNION ALL
                SELECT true, q.key, d.digest
                FROM tbl_repl.quarantined AS q
                LEFT JOIN LATERAL unnest(CASE WHEN q.sqlstate = '23000' AND q.message NOT LIKE 'conflict update_missing %%' AND q.expected IS NOT NULL THEN array_append(q.expected, '') ELSE q.expected END) AS d (digest) ON true
                WHERE q.target_id = %s AND q.key = ANY ($1)) AS x ON x.key = u.key
            GROUP BY u.key$query$, tbl_repl._pending_from(t, tbl_repl._position(t.target_id)), t.source_id, t.target_id)
        FROM tbl_repl.target AS t WHERE t.target_id = _expected.target_id)
    USING keys;
END
$function$;
COMMENT ON FUNCTION tbl_repl._expected(integer, text[]) IS
    'what the source has known of some rows on the target; SECURITY DEFINER, for owners of targets';

-- For newest: whether a deletion is queued that nobody kept the version of, because it was captured under another policy, or
-- a person wants it (repair_target).  What is found on the target then goes, whatever its version.
-- SECURITY DEFINER: render_N runs as the target's owner.
CREATE OR REPLACE FUNCTION tbl_repl._is_wanted_gone(target_id integer, key text)
RETURNS boolean
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    wanted boolean;
BEGIN
    EXECUTE (
        SELECT format('SELECT EXISTS (SELECT FROM %s AND c.olds IS NULL AND c.op IN (''D'', ''K'', ''T'') AND c.keys @> ARRAY[$1])',
                      tbl_repl._pending_from(t, tbl_repl._position(t.target_id)))
        FROM tbl_repl.target AS t WHERE t.target_id = _is_wanted_gone.target_id)
    INTO wanted USING key;
    RETURN wanted;
END
$function$;
COMMENT ON FUNCTION tbl_repl._is_wanted_gone(integer, text) IS
    'whether a deletion without a version is queued; SECURITY DEFINER, for owners of targets';

-- _settle(dst_table, policy, columns, key_columns, version_column, items, clear): runs on the target.  items: one object a key:
--   k: key values; r: values of the row as text, null: deleted; t: the row as one text (_row_text_sql); v: version,
--   of the row or of its tombstone; e: digests the source expects, '' for no row, null: any (keep, error); f: deleted,
--   whatever the version of what is found (newest).
--   clear: secondary unique values may wander between the rows, see _settle_clearing.
-- Returns the number of items.  Errors: 23000 a conflict under error; what the table says.
-- Not pinned: the target's own triggers need the search_path of this session.
CREATE OR REPLACE FUNCTION tbl_repl._settle(
    dst_table      text,
    policy         text,
    columns        name[],
    key_columns    name[],
    version_column name,
    items          jsonb,
    clear          boolean DEFAULT false
)
RETURNS integer
LANGUAGE plpgsql VOLATILE
AS $function$
BEGIN
    IF clear THEN
        RETURN tbl_repl._settle_clearing(dst_table::pg_catalog.regclass, policy, columns, key_columns, version_column, items,
                                         pg_catalog.current_setting('search_path'));
    END IF;
    RETURN tbl_repl._settle_items(dst_table::pg_catalog.regclass, policy, columns, key_columns, version_column, items,
                                  pg_catalog.current_setting('search_path'));
EXCEPTION WHEN foreign_key_violation THEN
    -- rows of one table that refer to each other want an order as well
    IF pg_catalog.jsonb_array_length(items) OPERATOR(pg_catalog.=) 1
       OR NOT EXISTS (SELECT FROM pg_catalog.pg_constraint AS f
                      WHERE f.contype OPERATOR(pg_catalog.=) 'f' AND f.conrelid OPERATOR(pg_catalog.=) dst_table::pg_catalog.regclass
                        AND f.confrelid OPERATOR(pg_catalog.=) f.conrelid) THEN
        RAISE;
    END IF;
    RETURN tbl_repl._settle_clearing(dst_table::pg_catalog.regclass, policy, columns, key_columns, version_column, items,
                                     pg_catalog.current_setting('search_path'));
END
$function$;
COMMENT ON FUNCTION tbl_repl._settle(text, text, name[], name[], name, jsonb, boolean) IS
    'applies values that another node has sent, by a conflict policy; returns how many';

-- _settle_shape(local_table, columns, key_columns, version_column, item, sent_version, sent_text): the pieces of SQL in
-- which rows d of the table and values meet; item: SQL expression of one value as _settle gets it; sent_...: of its version
-- and its row text (NULL: those of excluded, which are other ones where the table rounds, or has BEFORE triggers).
--   names, given, assigned: of an upsert; keys: its conflict target; always: it would write an identity column ALWAYS
--   matches: whether row d has the key of the value; row_text: row d as one text; newer: whether the value is
--   greater than d; version: that of row d; version_type, lowest: of versions, and what stands for none
-- Operators are named in full: the statements run under the search_path of the applier.
CREATE OR REPLACE FUNCTION tbl_repl._settle_shape(
    local_table    regclass,
    columns        name[],
    key_columns    name[],
    version_column name,
    item           text,
    sent_version   text,
    sent_text      text,
    OUT names        text,
    OUT given        text,
    OUT assigned     text,
    OUT keys         text,
    OUT always       boolean,
    OUT matches      text,
    OUT row_text     text,
    OUT newer        text,
    OUT version      text,
    OUT version_type text,
    OUT lowest       text
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    SELECT string_agg(format('%I', u.name), ', ' ORDER BY u.n),
           string_agg(format('(%s OPERATOR(pg_catalog.->) ''r'' OPERATOR(pg_catalog.->>) %s)::%s', item, u.n - 1, format_type(a.atttypid, -1)), ', ' ORDER BY u.n),
           coalesce(string_agg(format('%1$I = excluded.%1$I', u.name), ', ' ORDER BY u.n) FILTER (WHERE a.attidentity <> 'a'), ''),
           bool_or(a.attidentity = 'a'),
           format('pg_catalog.array_to_string(ARRAY[%s], '','')',
                  string_agg(format('pg_catalog.quote_nullable(d.%I::text)', u.name), ', ' ORDER BY u.name::text COLLATE "C")),
           format('pg_catalog.array_to_string(ARRAY[%s], '','')',
                  string_agg(format('pg_catalog.quote_nullable(excluded.%I::text)', u.name), ', ' ORDER BY u.name::text COLLATE "C"))
    INTO names, given, assigned, always, row_text, newer
    FROM unnest(columns) WITH ORDINALITY AS u (name, n)
    JOIN pg_attribute AS a ON a.attrelid = local_table AND a.attname = u.name;
    SELECT string_agg(format('%I', u.name), ', ' ORDER BY u.n),
           string_agg(format('d.%I OPERATOR(pg_catalog.=) (%s OPERATOR(pg_catalog.->) ''k'' OPERATOR(pg_catalog.->>) %s)::%s',
                             u.name, item, u.n - 1, format_type(a.atttypid, -1)), ' AND ' ORDER BY u.n)
    INTO keys, matches
    FROM unnest(key_columns) WITH ORDINALITY AS u (name, n)
    JOIN pg_attribute AS a ON a.attrelid = local_table AND a.attname = u.name;
    SELECT CASE a.atttypid WHEN 'timestamptz'::regtype THEN 'timestamptz' ELSE 'int8' END INTO version_type
    FROM pg_attribute AS a WHERE a.attrelid = local_table AND a.attname = version_column;
    lowest := CASE version_type WHEN 'timestamptz' THEN '-infinity' ELSE '-9223372036854775808' END;
    version := CASE WHEN version_column IS NULL THEN 'NULL::text' ELSE format('d.%I::text', version_column) END;
    newer := CASE WHEN version_column IS NOT NULL THEN
        format('coalesce(d.%1$I, %2$L::%3$s) OPERATOR(pg_catalog.<) coalesce((%4$s)::%3$s, %2$L::%3$s) '
               'OR coalesce(d.%1$I, %2$L::%3$s) OPERATOR(pg_catalog.=) coalesce((%4$s)::%3$s, %2$L::%3$s) AND %5$s COLLATE "C" OPERATOR(pg_catalog.<) %6$s',
               version_column, lowest, version_type, coalesce(sent_version, format('excluded.%I', version_column)), row_text, coalesce(sent_text, newer)) END;
END
$function$;
COMMENT ON FUNCTION tbl_repl._settle_shape(regclass, name[], name[], name, text, text, text) IS
    'the pieces of SQL in which rows of a table and values sent by another node meet';

-- Where a unique value is taken from one row and given to another, the one that gives has to come first; where they take
-- from each other in a ring, all of them are deleted and inserted again, unless that would take children along.  What
-- gets there has won already: a row that is refused violates nothing.  Rows that refer to other rows come after those.
CREATE OR REPLACE FUNCTION tbl_repl._settle_clearing(
    local_table    regclass,
    policy         text,
    columns        name[],
    key_columns    name[],
    version_column name,
    items          jsonb,
    path           text
)
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    old_settling text := coalesce(current_setting('tbl_repl.settling', true), '');
    todo  jsonb := items;
    ring  jsonb;
    item  jsonb;
    drop_sql text;
BEGIN
    LOOP
        ring := '[]';
        FOR item IN SELECT x FROM jsonb_array_elements(todo) AS x LOOP
            BEGIN
                PERFORM tbl_repl._settle_items(local_table, policy, columns, key_columns, version_column, jsonb_build_array(item), path);
            EXCEPTION WHEN unique_violation OR foreign_key_violation THEN
                ring := ring || jsonb_build_array(item);
            END;
        END LOOP;
        EXIT WHEN jsonb_array_length(ring) IN (0, jsonb_array_length(todo));
        todo := ring;
    END LOOP;
    IF ring <> '[]' THEN
        IF NOT EXISTS (SELECT FROM pg_constraint AS f WHERE f.contype = 'f' AND f.confrelid = local_table AND (f.conrelid <> f.confrelid OR f.confdeltype <> 'a')) THEN
            SELECT format('DELETE FROM %s AS d USING pg_catalog.jsonb_array_elements($1) AS x (item) WHERE %s', local_table, s.matches)
            INTO drop_sql
            FROM tbl_repl._settle_shape(local_table, columns, key_columns, version_column, 'x.item', NULL, NULL) AS s;
            PERFORM set_config('tbl_repl.settling', 'on', true);
            PERFORM set_config('search_path', path, true);
            EXECUTE drop_sql USING ring;
            PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
            PERFORM set_config('tbl_repl.settling', old_settling, true);
        END IF;
        PERFORM tbl_repl._settle_items(local_table, policy, columns, key_columns, version_column,
                                       (SELECT jsonb_agg(x || '{"e": null}') FROM jsonb_array_elements(ring) AS x), path);
    END IF;
    RETURN jsonb_array_length(items);
END
$function$;
COMMENT ON FUNCTION tbl_repl._settle_clearing(regclass, text, name[], name[], name, jsonb, text) IS
    '_settle where unique values wander between rows';

CREATE OR REPLACE FUNCTION tbl_repl._settle_items(
    local_table    regclass,
    policy         text,
    columns        name[],
    key_columns    name[],
    version_column name,
    items          jsonb,
    path           text
)
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    origin      text := nullif(current_setting('tbl_repl.origin', true), '');
    old_settling text := coalesce(current_setting('tbl_repl.settling', true), '');
    local_keys  name[];
    shape       record;
    lock_sql    text;
    put_sql     text;
    add_sql     text;
    drop_sql    text;
    item        record;
    here        record;
    rivals      jsonb;
    key         text;
    changed     bigint;
    refused     text[] := '{}';
    kind        text;
    settled     text[] := '{}';
    noted       boolean := false;
BEGIN
    SELECT coalesce((SELECT s.key_columns FROM tbl_repl.source AS s
                     WHERE s.source_table = local_table AND s.key_columns @> _settle_items.key_columns AND s.key_columns <@ _settle_items.key_columns
                     ORDER BY s.source_id LIMIT 1), key_columns) INTO local_keys;
    shape := tbl_repl._settle_shape(local_table, columns, key_columns, version_column, '$1', '$2', '$3');
    add_sql := format('INSERT INTO %s AS d (%s)%s VALUES (%s) ON CONFLICT (%s)', local_table, shape.names,
                      CASE WHEN shape.always THEN ' OVERRIDING SYSTEM VALUE' END, shape.given, shape.keys);
    put_sql := format('%s DO UPDATE SET %s WHERE %s', add_sql, shape.assigned,
                      CASE WHEN policy = 'newest' THEN shape.newer ELSE format('%s OPERATOR(pg_catalog.=) $2', shape.row_text) END);
    add_sql := format('%s DO NOTHING', add_sql);
    lock_sql := format('SELECT %s AS row_text, %s AS version FROM %s AS d WHERE %s FOR UPDATE', shape.row_text, shape.version, local_table, shape.matches);
    drop_sql := format('DELETE FROM %s AS d WHERE %s AND %s', local_table, shape.matches,
                       CASE WHEN policy = 'newest' THEN format('(d.%1$I IS NULL OR d.%1$I OPERATOR(pg_catalog.<=) $2::%2$s)', version_column, shape.version_type)
                            ELSE format('%s OPERATOR(pg_catalog.=) $2', shape.row_text) END);

    PERFORM set_config('tbl_repl.settling', 'on', true);
    -- values that were changed here meanwhile: an arriving one that wins is a conflict as well
    SELECT coalesce(jsonb_object_agg(h.key, h.op), '{}') INTO rivals
    FROM tbl_repl._changed_here(local_table, ARRAY(
        SELECT tbl_repl._own_key(key_columns, local_keys, x.item -> 'k') FROM jsonb_array_elements(items) AS x (item)), origin) AS h;
    IF policy = 'newest' THEN
        settled := tbl_repl._settle_at_once(local_table, columns, key_columns, local_keys, version_column,
            (SELECT jsonb_agg(jsonb_build_object('o', o.key) || x.item ORDER BY x.n)
             FROM jsonb_array_elements(items) WITH ORDINALITY AS x (item, n)
             CROSS JOIN LATERAL tbl_repl._own_key(key_columns, local_keys, x.item -> 'k') AS o (key)
             WHERE NOT rivals ? o.key), path);
    END IF;
    FOR item IN
        SELECT x.item AS value, x.item -> 'k' AS key_values, jsonb_typeof(x.item -> 'r') IS DISTINCT FROM 'array' AS gone, x.item ->> 't' AS row_text, x.item ->> 'v' AS version, coalesce((x.item ->> 'f')::boolean, false) AS forced,
               CASE jsonb_typeof(x.item -> 'e') WHEN 'array' THEN ARRAY(SELECT e FROM jsonb_array_elements_text(x.item -> 'e') AS e) END AS expected
        FROM jsonb_array_elements(items) AS x (item)
    LOOP
        key := tbl_repl._own_key(key_columns, local_keys, item.key_values);
        CONTINUE WHEN key = ANY (settled);
        kind := NULL;
        PERFORM set_config('search_path', path, true);
        EXECUTE lock_sql INTO here USING item.value;
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
        IF policy = 'newest' THEN
            IF item.forced AND here.row_text IS NOT NULL THEN
                item.version := coalesce(here.version, shape.lowest);
            END IF;
            kind := tbl_repl._settle_newest(local_table, item.value, key, item.gone, item.row_text, item.version, here.row_text, here.version,
                                            shape.version_type, rivals ->> key, put_sql, drop_sql, path);
            IF kind LIKE '%!' THEN
                refused := array_append(refused, key);
            END IF;
        ELSE
            PERFORM set_config('search_path', path, true);
            IF NOT item.gone AND here.row_text IS NULL THEN
                IF item.expected IS NULL OR '' OPERATOR(pg_catalog.=) ANY (item.expected) THEN
                    EXECUTE add_sql USING item.value;
                    GET DIAGNOSTICS changed = ROW_COUNT;
                    kind := CASE WHEN changed OPERATOR(pg_catalog.=) 0 THEN 'insert_exists!' END;
                ELSE
                    kind := 'update_missing!';
                END IF;
            ELSIF NOT item.gone AND here.row_text OPERATOR(pg_catalog.<>) item.row_text THEN
                IF item.expected IS NULL OR pg_catalog.md5(here.row_text) OPERATOR(pg_catalog.=) ANY (item.expected) THEN
                    EXECUTE put_sql USING item.value, here.row_text;
                ELSE
                    kind := CASE WHEN item.expected OPERATOR(pg_catalog.=) '{""}' THEN 'insert_exists!' ELSE 'update_origin_differs!' END;
                END IF;
            ELSIF item.gone AND here.row_text IS NOT NULL THEN
                IF item.expected IS NULL OR pg_catalog.md5(here.row_text) OPERATOR(pg_catalog.=) ANY (item.expected) THEN
                    EXECUTE drop_sql USING item.value, here.row_text;
                ELSE
                    kind := 'delete_origin_differs!';
                END IF;
            END IF;
            PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
            IF kind IS NOT NULL AND policy = 'error' THEN
                RAISE EXCEPTION USING
                    ERRCODE = 'integrity_constraint_violation',
                    MESSAGE = format('conflict %s on table %s, key %s: sent %s, found %s', rtrim(kind, '!'), local_table, item.key_values,
                                     coalesce('(' || item.row_text || ')', 'a deletion'), coalesce('(' || here.row_text || ')', 'no row')),
                    HINT    = CASE kind WHEN 'update_missing!' THEN 'Delete the row on the source, too; or send it all the same: SELECT tbl_repl.repair_target(...); then replay.'
                                   ELSE 'Make the row the same on both sides, or delete it on the target, then replay.' END;
            END IF;
        END IF;
        IF kind IS NOT NULL THEN
            INSERT INTO tbl_repl.conflict (local_table, key, conflict_type, origin, local_version, remote_version, resolution)
            VALUES (_settle_items.local_table, tbl_repl._key_json(_settle_items.local_table, local_keys, key),
                    rtrim(kind, '!'), origin, here.version, item.version, CASE WHEN kind LIKE '%!' THEN 'kept' ELSE 'applied' END);
            noted := true;
        END IF;
    END LOOP;
    PERFORM set_config('tbl_repl.settling', old_settling, true);
    IF noted THEN
        PERFORM tbl_repl._trim_conflicts();
    END IF;
    IF policy = 'newest' AND extract(microseconds FROM clock_timestamp())::integer % 16 = 0 THEN
        PERFORM tbl_repl._purge_tombstones();
    END IF;
    IF cardinality(refused) > 0 THEN
        PERFORM tbl_repl._send_back(local_table, refused);
    END IF;
    RETURN jsonb_array_length(items);
END
$function$;
COMMENT ON FUNCTION tbl_repl._settle_items(regclass, text, name[], name[], name, jsonb, text) IS
    '_settle with the search_path that the target''s own triggers need';

-- _settle_at_once: the usual case of newest, many values that meet nothing greater, by a few statements for all of
-- them.  items: as for _settle, with o: the key as this node writes it.  Returns the keys that are settled; the
-- others are looked at one by one.  The rules are those of _settle_newest: rows before tombstones, and once a row
-- is written or gone the tombstones are looked at in a new statement; a row that comes out dead is left to that.
CREATE OR REPLACE FUNCTION tbl_repl._settle_at_once(
    local_table    regclass,
    columns        name[],
    key_columns    name[],
    local_keys     name[],
    version_column name,
    items          jsonb,
    path           text
)
RETURNS text[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    shape   record;
    version_type text;
    put_sql text;
    del_sql text;
    see_sql text;
    written text[];
    deleted text[];
    alive   text[];
BEGIN
    IF jsonb_array_length(items) < 2 THEN
        RETURN '{}';
    END IF;
    shape := tbl_repl._settle_shape(local_table, columns, key_columns, version_column, 'x.item', NULL, NULL);
    version_type := shape.version_type;
    IF shape.always THEN
        RETURN '{}';
    END IF;
    put_sql := format(
        'WITH i AS (SELECT x.item FROM pg_catalog.jsonb_array_elements($1) WITH ORDINALITY AS x (item, n) '
        'WHERE pg_catalog.jsonb_typeof(x.item OPERATOR(pg_catalog.->) ''r'') OPERATOR(pg_catalog.=) ''array'' AND NOT EXISTS (SELECT FROM tbl_repl.tombstone AS b '
        'WHERE b.local_table OPERATOR(pg_catalog.=) %1$s::pg_catalog.oid AND b.key OPERATOR(pg_catalog.=) (x.item OPERATOR(pg_catalog.->>) ''o'') '
        'AND b.version::%2$s OPERATOR(pg_catalog.>=) coalesce((x.item OPERATOR(pg_catalog.->>) ''v'')::%2$s, %3$L::%2$s)) ORDER BY x.n), '
        'put AS (INSERT INTO %4$s AS d (%5$s) SELECT %6$s FROM i AS x ON CONFLICT (%7$s) DO UPDATE SET %8$s WHERE %9$s RETURNING %10$s AS key) '
        'SELECT pg_catalog.array_agg(put.key) FROM put',
        local_table::oid, version_type, shape.lowest, local_table, shape.names, shape.given, shape.keys, shape.assigned, shape.newer,
        tbl_repl._key_text(local_keys, 'd'));
    del_sql := format(
        'WITH gone AS (DELETE FROM %1$s AS d USING pg_catalog.jsonb_array_elements($1) AS x (item) '
        'WHERE pg_catalog.jsonb_typeof(x.item OPERATOR(pg_catalog.->) ''r'') IS DISTINCT FROM ''array'' AND x.item OPERATOR(pg_catalog.->>) ''v'' IS NOT NULL AND %2$s '
        'AND coalesce(d.%3$I, %4$L::%5$s) OPERATOR(pg_catalog.<=) (x.item OPERATOR(pg_catalog.->>) ''v'')::%5$s RETURNING 1) SELECT pg_catalog.count(*) FROM gone',
        local_table, shape.matches, version_column, shape.lowest, version_type);
    see_sql := format(
        'SELECT pg_catalog.array_agg(x.item OPERATOR(pg_catalog.->>) ''o'') FROM pg_catalog.jsonb_array_elements($1) AS x (item) JOIN %s AS d ON %s '
        'WHERE pg_catalog.jsonb_typeof(x.item OPERATOR(pg_catalog.->) ''r'') IS DISTINCT FROM ''array''', local_table, shape.matches);

    PERFORM set_config('search_path', path, true);
    EXECUTE put_sql INTO written USING items;
    EXECUTE del_sql USING items;
    EXECUTE see_sql INTO alive USING items;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    -- rows: what has been buried since, or while we waited, or is being buried beside us, is left (see _lock_grave);
    -- older tombstones go
    WITH graves AS (
        INSERT INTO tbl_repl.tombstone AS b (local_table, key, version)
        SELECT _settle_at_once.local_table, x.item ->> 'o', ''
        FROM jsonb_array_elements(items) WITH ORDINALITY AS x (item, n)
        WHERE x.item ->> 'o' = ANY (written)
        ORDER BY x.n
        ON CONFLICT ON CONSTRAINT tombstone_pkey DO UPDATE SET at = b.at
        RETURNING b.key, nullif(b.version, '') AS version
    )
    SELECT array_agg(g.key) INTO written
    FROM graves AS g
    JOIN jsonb_array_elements(items) AS x (item) ON x.item ->> 'o' = g.key
    WHERE g.version IS NULL OR tbl_repl._rank(g.version, version_type) < tbl_repl._rank(x.item ->> 'v', version_type);
    DELETE FROM tbl_repl.tombstone AS b
    WHERE b.local_table = _settle_at_once.local_table AND b.key = ANY (written);
    -- deletions: of what is not alive any more
    WITH buried AS (
        INSERT INTO tbl_repl.tombstone AS b (local_table, key, version)
        SELECT _settle_at_once.local_table, x.item ->> 'o', x.item ->> 'v'
        FROM jsonb_array_elements(items) WITH ORDINALITY AS x (item, n)
        WHERE jsonb_typeof(x.item -> 'r') IS DISTINCT FROM 'array' AND x.item ->> 'v' IS NOT NULL
          AND x.item ->> 'o' <> ALL (coalesce(alive, '{}'))
        ORDER BY x.n
        ON CONFLICT ON CONSTRAINT tombstone_pkey DO UPDATE
        SET version = CASE WHEN tbl_repl._rank(b.version, version_type) < tbl_repl._rank(excluded.version, version_type)
                           THEN excluded.version ELSE b.version END, at = clock_timestamp()
        RETURNING b.key
    )
    SELECT array_agg(g.key) INTO deleted FROM buried AS g;
    -- who wrote such a row beside us has been waited for, at its tombstone
    PERFORM set_config('search_path', path, true);
    EXECUTE del_sql USING items;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    RETURN coalesce(written, '{}') || coalesce(deleted, '{}');
END
$function$;
COMMENT ON FUNCTION tbl_repl._settle_at_once(regclass, name[], name[], name[], name, jsonb, text) IS
    'settles those of many values under newest that meet nothing greater';

-- A key as this node writes it: the columns may stand in another order there.
CREATE OR REPLACE FUNCTION tbl_repl._own_key(key_columns name[], local_keys name[], key_values jsonb)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN cardinality(local_keys) = 1 THEN key_values ->> 0
                ELSE (SELECT json_build_array(VARIADIC array_agg(key_values ->> (array_position(key_columns, l.name) - 1) ORDER BY l.n))::text
                      FROM unnest(local_keys) WITH ORDINALITY AS l (name, n)) END
$function$;
COMMENT ON FUNCTION tbl_repl._own_key(name[], name[], jsonb) IS 'key values as the one text that this node uses';

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

-- _settle_newest: one value under newest; the caller has locked the row.  Returns the conflict it was, NULL: none; with ! at
-- its end: refused, what is here is greater.
CREATE OR REPLACE FUNCTION tbl_repl._settle_newest(
    local_table  regclass,
    item         jsonb,
    key          text,
    gone         boolean,
    row_text     text,
    version      text,
    here_text    text,
    here_version text,
    version_type text,
    rival        text,
    put_sql      text,
    drop_sql     text,
    path         text
)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    sent     numeric := tbl_repl._rank(version, version_type);
    standing numeric := tbl_repl._rank(here_version, version_type);
    grave    text;
    buried   numeric;
    changed  bigint;
BEGIN
    IF gone AND version IS NULL THEN
        RETURN NULL;  -- gone before there were tombstones: nothing is known of it
    END IF;
    -- Rows before tombstones: where there is no row yet, somebody may be writing one who will want the tombstone next.
    grave := tbl_repl._buried(local_table, key, gone OR here_text IS NOT NULL);
    buried := CASE WHEN grave IS NOT NULL THEN tbl_repl._rank(grave, version_type) END;
    IF gone THEN
        IF here_text IS NOT NULL AND standing > sent THEN
            RETURN 'delete_origin_differs!';
        ELSIF here_text IS NOT NULL THEN
            PERFORM set_config('search_path', path, true);
            EXECUTE drop_sql USING item, version;
            GET DIAGNOSTICS changed = ROW_COUNT;
            PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
            IF changed = 0 THEN
                RETURN 'delete_origin_differs!';
            END IF;
        END IF;
        INSERT INTO tbl_repl.tombstone AS b (local_table, key, version) VALUES (local_table, key, version)
        ON CONFLICT ON CONSTRAINT tombstone_pkey DO UPDATE
        SET version = excluded.version, at = clock_timestamp()
        WHERE tbl_repl._rank(b.version, version_type) < tbl_repl._rank(excluded.version, version_type);
        IF here_text IS NULL THEN
            -- who wrote the row beside us has been waited for, at its tombstone
            PERFORM set_config('search_path', path, true);
            EXECUTE drop_sql USING item, version;
            PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
        END IF;
        RETURN CASE WHEN here_text IS NOT NULL AND rival IS NOT NULL THEN 'delete_origin_differs' END;
    END IF;
    IF buried >= sent THEN
        IF here_text IS NOT NULL AND standing <= buried THEN
            -- dead all the same: written while its deletion was on its way
            PERFORM set_config('search_path', path, true);
            EXECUTE drop_sql USING item, grave;
            PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
        END IF;
        RETURN 'update_missing!';
    ELSIF here_text = row_text THEN
        IF buried < sent THEN
            PERFORM tbl_repl._unbury(local_table, key);
        END IF;
        RETURN NULL;
    ELSIF here_text IS NOT NULL AND (standing > sent OR (standing = sent AND here_text COLLATE "C" > row_text)) THEN
        RETURN CASE WHEN rival = 'I' THEN 'insert_exists!' ELSE 'update_origin_differs!' END;
    END IF;
    PERFORM set_config('search_path', path, true);
    EXECUTE put_sql USING item, version, row_text;
    GET DIAGNOSTICS changed = ROW_COUNT;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    IF changed = 0 THEN
        RETURN 'insert_exists!';  -- written here since we looked, and greater
    END IF;
    -- The upsert may have waited for a local DELETE, and have put the row back; and where there was no row, whoever
    -- settles its deletion beside us had none to wait for.
    buried := tbl_repl._rank(b, version_type)
              FROM (SELECT CASE WHEN here_text IS NULL THEN tbl_repl._lock_grave(local_table, key) ELSE tbl_repl._buried(local_table, key) END) AS g (b)
              WHERE b IS NOT NULL;
    IF buried >= sent THEN
        PERFORM set_config('search_path', path, true);
        EXECUTE drop_sql USING item, version;
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
        RETURN 'update_missing!';
    END IF;
    PERFORM tbl_repl._unbury(local_table, key);
    RETURN CASE WHEN rival IN ('D', 'K', 'T') THEN 'update_missing' WHEN rival = 'I' THEN 'insert_exists'
                WHEN rival IS NOT NULL THEN 'update_origin_differs' END;
END
$function$;
COMMENT ON FUNCTION tbl_repl._settle_newest(regclass, jsonb, text, boolean, text, text, text, text, text, text, text, text, text) IS
    'settles one value under newest';

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

-- Versions of both kinds as numbers; none is the least there is.
CREATE OR REPLACE FUNCTION tbl_repl._rank(version text, version_type text)
RETURNS numeric
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE version_type WHEN 'timestamptz' THEN extract(epoch FROM coalesce(version, '-infinity')::timestamptz)
                             ELSE coalesce(version, '-9223372036854775808')::numeric END
$function$;
COMMENT ON FUNCTION tbl_repl._rank(text, text) IS 'a version as a number';
