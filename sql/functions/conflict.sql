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

-- What an applier has changed in a table that is replicated from here, too: it is carried on to the targets
-- that take any origin, always by the queue; and it may have met a change made here.  Not to the node where it was made, nor to
-- the one it has come from: by the time it got there it could be older than what that one has.
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
DECLARE
    via text := coalesce(nullif(current_setting('tbl_repl.via', true), ''), origin);
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
    SELECT h.segment, _capture_carried.source_id, t.target_id, _capture_carried.op, _capture_carried.keys,
           cardinality(_capture_carried.keys), _capture_carried.origin, _capture_carried.olds
    FROM tbl_repl.queue_head AS h, tbl_repl.target AS t
    WHERE t.source_id = _capture_carried.source_id AND t.forward = 'any'
      AND t.remote ->> 'node' IS DISTINCT FROM _capture_carried.origin AND t.remote ->> 'node' IS DISTINCT FROM via;
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
