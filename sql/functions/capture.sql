-- Capture: the triggers and the trigger function of one replicated table, as text first.
--
-- Promises that every committed change leaves its key in the queue (async targets) or in the stash of
-- its transaction (direct targets), and no trace in the application.  Which rows go where is left to
-- shipping: here only rows are skipped that no target of the table wants, before and after.

-- _capture_sql(source_id): CREATE OR REPLACE FUNCTION tbl_repl.capture_N for the present targets: TRUNCATE first, then what
-- collects the keys of a statement or row (changed, and former where a key was another one), then what stores them.
-- The function is SECURITY DEFINER: who writes the table has no right on the queue.
CREATE OR REPLACE FUNCTION tbl_repl._capture_sql(source_id integer)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    source   tbl_repl.source%ROWTYPE;
    same     text;  -- whether the key has the types that it had, for otherwise its text may be another one
    key_s    text;
    key_type text;
    policy   record;
    settings text;
    store    text;
    collect  text;
    body     text;
BEGIN
    SELECT * INTO STRICT source FROM tbl_repl.source AS s WHERE s.source_id = _capture_sql.source_id;
    same := tbl_repl._same_types(source.source_table, source.key_columns);
    key_s := format('CASE WHEN %s THEN %s END', same, tbl_repl._key_text(source.key_columns, 's'));
    key_type := tbl_repl._native_key_type(source);
    -- old: what a conflict policy needs of the old row; absent: the same where there was none
    SELECT tbl_repl._old_value_sql(t) AS old, CASE t.on_conflict WHEN 'newest' THEN 'NULL::text' ELSE '''''::text' END AS absent,
           tbl_repl._text_settings('{timestamptz}'::regtype[]::oid[] || ARRAY(SELECT p.type_id FROM tbl_repl._key_parts(source.source_table, source.key_columns) AS p)
                                   || tbl_repl._with_filter(tbl_repl._sent_types(t, source.source_table), t)) AS settings
    INTO policy
    FROM tbl_repl.target AS t WHERE t.source_id = source.source_id AND t.on_conflict <> 'overwrite' ORDER BY t.target_id LIMIT 1;
    IF FOUND THEN
        settings := policy.settings;
    ELSE
        SELECT tbl_repl._text_settings(array_agg(p.type_id)) INTO settings
        FROM tbl_repl._key_parts(source.source_table, source.key_columns) AS p;
    END IF;
    store := tbl_repl._capture_store_sql(source_id, policy.old IS NOT NULL);
    collect := tbl_repl._capture_keys_sql(source.capture, key_s,
                                          CASE WHEN key_type IS NOT NULL THEN format('CASE WHEN %s THEN s.%I END', same, source.key_columns[1]) END,
                                          tbl_repl._capture_filter(source));
    IF policy.old IS NOT NULL THEN
        -- where a column that a policy looks at is gone, changes are kept without what it was
        collect := concat(E'    BEGIN\n', tbl_repl._capture_olds_sql(source.capture, key_s, policy.old, policy.absent),
                          E'\n    EXCEPTION WHEN assert_failure OR OTHERS THEN\n        olds := NULL;\n        former_olds := NULL;\n',
                          collect, E'\n    END;');
    END IF;

    body := concat(
        E'\n#variable_conflict use_column\nDECLARE\n',
        -- a variable: an expression over TG_OP would be planned anew at every call
        E'    op "char" := left(TG_OP, 1);\n',
        E'    root oid;\n    changed text[];\n    former text[];\n    olds text[];\n    stored boolean := false;\n', CASE WHEN policy.old IS NOT NULL THEN E'    former_olds text[];\n' END,
        E'    carried text := current_setting(''tbl_repl.origin'', true);\n',
        CASE WHEN key_type IS NOT NULL THEN format(E'    new_keys %1$s;\n    old_keys %1$s;\n', key_type) END, E'BEGIN\n',
        CASE WHEN NOT tbl_repl._carries(source_id) THEN E'    IF carried <> '''' THEN RETURN NULL; END IF;\n' END,
        CASE WHEN source.capture = 'row' AND tbl_repl._takes_any(source_id)
             -- left from a time when the other one was not needed
             THEN format(E'    IF TG_NAME = %L THEN RETURN NULL; END IF;\n', format('_tbl_repl_%s_row', source_id)) END,
        tbl_repl._capture_truncate_sql(source, key_s, policy.old, store), E'\n', collect,
        E'\n    IF changed IS NOT NULL THEN\n    ',
        concat_ws(E'\n    ', tbl_repl._filled_in(store, 'op', 'changed', 'olds'), tbl_repl._bury_sql(source, 'changed', 'olds', 'false')),
        E'\n    END IF;\n    IF former IS NOT NULL THEN\n    ',
        concat_ws(E'\n    ', tbl_repl._filled_in(store, '''K''', 'former', 'former_olds'), tbl_repl._bury_sql(source, 'former', 'former_olds', 'false')),
        E'\n    END IF;\n    RETURN NULL;\nEND\n');
    RETURN format($sql$CREATE OR REPLACE FUNCTION tbl_repl.%I()
RETURNS trigger
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp%s%s
AS %L$sql$,
        format('capture_%s', source.source_id), E'\n' || nullif(settings, ''), tbl_repl._literal_setting(body), body);
END
$function$;
COMMENT ON FUNCTION tbl_repl._capture_sql(integer) IS
    'text of the trigger function of a replicated table';

-- One type for integers of any size: their column may become a larger one.  Not for types of users, which may be renamed.
CREATE OR REPLACE FUNCTION tbl_repl._native_key_type(source tbl_repl.source)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('%s[]', CASE WHEN p.type_id = ANY ('{int2,int4,int8}'::regtype[]::oid[]) THEN 'bigint' ELSE p.type END)
    FROM tbl_repl._key_parts(source.source_table, source.key_columns) AS p
    WHERE source.capture = 'statement' AND cardinality(source.key_columns) = 1 AND p.type_id < 16384
      AND tbl_repl._has_exact_key(source.source_table, source.key_columns)
$function$;
COMMENT ON FUNCTION tbl_repl._native_key_type(tbl_repl.source) IS
    'array type in which the keys of a table can be collected as they are; NULL: as text only';

-- A filter runs as its target's owner: only where all targets have the owner of the trigger function.  And it decides what is sent
-- by the state at commit: what it says may not depend on anything but the row, nor on the settings of who writes.
CREATE OR REPLACE FUNCTION tbl_repl._capture_filter(source tbl_repl.source)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN bool_and(t.filter_expr IS NOT NULL AND t.filter_is_immutable) AND bool_and(t.on_conflict = 'overwrite') AND count(DISTINCT t.owner) = 1
                     AND min(t.owner::text) = coalesce((SELECT r.rolname::text FROM pg_proc AS f JOIN pg_roles AS r ON r.oid = f.proowner
                                                        WHERE f.pronamespace = 'tbl_repl'::regnamespace
                                                          AND f.proname = format('capture_%s', source.source_id)), current_user)
                     -- a virtual generated column has no value in a trigger
                     AND NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = source.source_table AND a.attgenerated = 'v')
                THEN string_agg(DISTINCT format('(%s)', t.filter_expr), ' OR ') END
    FROM tbl_repl.target AS t WHERE t.source_id = source.source_id
$function$;
COMMENT ON FUNCTION tbl_repl._capture_filter(tbl_repl.source) IS
    'expression over a row s that some target of a table wants; NULL: every row is kept';

-- {op}, {keys} and {olds} are filled in by _filled_in.
CREATE OR REPLACE FUNCTION tbl_repl._capture_store_sql(source_id integer, with_olds boolean)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    quick   integer := tbl_repl._quick_target(source_id);
    direct  boolean;
    queued  boolean;
    defined text[];
    store   text;
BEGIN
    SELECT bool_or(t.mode <> 'async'), bool_or(t.mode = 'async'),
           array_agg(format('%s:%s:%s', t.target_id, t.generation, t.mode) ORDER BY t.target_id) FILTER (WHERE t.mode <> 'async')
    INTO direct, queued, defined
    FROM tbl_repl.target AS t WHERE t.source_id = _capture_store_sql.source_id;
    store := concat_ws(E'\n    ',
        CASE WHEN direct THEN format(
            $piece$IF current_setting('transaction_isolation') = 'read committed' OR tbl_repl._capture_by_snapshot(%1$s, %4$L, {op}, {keys}{v}) THEN
        IF cardinality({keys}) = 1 AND %2$L THEN
            INSERT INTO tbl_repl.flush (target_id, op, key) VALUES (%3$L, {op}, {keys}[1]) ON CONFLICT DO NOTHING;
            stored := FOUND;
        END IF;
        IF NOT stored THEN
            INSERT INTO tbl_repl.stash (source_id, op, keys, row_count{c}) VALUES (%1$s, {op}, {keys}, coalesce(cardinality({keys}), 1){v});
            INSERT INTO tbl_repl.flush DEFAULT VALUES ON CONFLICT DO NOTHING;
        END IF;
        stored := false;
    END IF;$piece$, source_id, quick IS NOT NULL, quick, defined) END,
        CASE WHEN queued THEN format(
            $piece$INSERT INTO tbl_repl.change (segment, source_id, op, keys, row_count{c})
    VALUES ((SELECT h.segment FROM tbl_repl.queue_head AS h), %1$s, {op}, {keys}, coalesce(cardinality({keys}), 1){v});
    IF NOT pg_try_advisory_xact_lock_shared(%2$s, 0) AND current_setting('transaction_isolation') <> 'serializable' THEN
        -- the worker sleeps: the flush wakes it (not here: PREPARE TRANSACTION refuses what has notified)
        INSERT INTO tbl_repl.stash (source_id, op, row_count) VALUES (%1$s, 'W', 0);
        INSERT INTO tbl_repl.flush DEFAULT VALUES ON CONFLICT DO NOTHING;
    END IF;$piece$, source_id, tbl_repl._lock_sleep()) END);

    IF tbl_repl._carries(source_id) THEN
        store := format(E'IF carried <> '''' THEN\n        PERFORM tbl_repl._capture_carried(%s, {op}, {keys}, carried{v});\n    ELSE\n    %s\n    END IF;', source_id, store);
    END IF;
    RETURN replace(replace(store, '{c}', CASE WHEN with_olds THEN ', olds' ELSE '' END),
                   '{v}', CASE WHEN with_olds THEN ', {olds}' ELSE '' END);
END
$function$;
COMMENT ON FUNCTION tbl_repl._capture_store_sql(integer, boolean) IS
    'statements of a trigger function that store keys: in the queue for async targets, in the stash of the transaction for direct ones';

CREATE OR REPLACE FUNCTION tbl_repl._filled_in(store text, op text, keys text, olds text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT replace(replace(replace(store, '{op}', op), '{keys}', keys), '{olds}', olds)
$function$;
COMMENT ON FUNCTION tbl_repl._filled_in(text, text, text, text) IS
    'statements that store keys, for certain variables of a trigger function';

-- Row triggers: PostgreSQL clones them to every partition there is and will be.
CREATE OR REPLACE FUNCTION tbl_repl._capture_keys_sql(
    capture  text,
    key_s    text,
    native_s text,
    filter   text
)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN capture = 'statement' THEN concat(
            E'    IF TG_OP = ''INSERT'' THEN\n        ', tbl_repl._collect_sql(format('array_agg(%s)', key_s), 'changed', 'new_rows', filter),
            E'\n    ELSIF TG_OP = ''DELETE'' THEN\n        ', tbl_repl._collect_sql(format('array_agg(%s)', key_s), 'changed', 'old_rows', filter),
            E'\n    ELSE\n        ',
            CASE WHEN filter IS NULL AND native_s IS NOT NULL
                 -- compared as they are: text is needed of one list only
                 THEN format(E'SELECT (SELECT array_agg(%1$s) FROM new_rows AS s), (SELECT array_agg(%1$s) FROM old_rows AS s) INTO new_keys, old_keys;'
                             '\n        changed := new_keys::text[];'
                             '\n        former := CASE WHEN old_keys = new_keys THEN changed ELSE old_keys::text[] END;',
                             native_s)
                 WHEN filter IS NULL
                 -- one query costs less than two
                 THEN format('SELECT (SELECT array_agg(%1$s) FROM new_rows AS s), (SELECT array_agg(%1$s) FROM old_rows AS s) INTO changed, former;', key_s)
                 ELSE concat_ws(E'\n        ', tbl_repl._collect_sql(format('array_agg(%s)', key_s), 'changed', 'new_rows', filter),
                                               tbl_repl._collect_sql(format('array_agg(%s)', key_s), 'former', 'old_rows', filter)) END,
            E'\n        IF former = changed THEN\n            former := NULL;\n        ELSE\n',
            E'            SELECT array_agg(k) INTO former FROM (SELECT unnest(former) EXCEPT SELECT unnest(changed)) AS f (k);\n',
            E'        END IF;\n    END IF;')
    ELSE concat(
            E'    IF TG_OP <> ''DELETE'' THEN\n        ', tbl_repl._collect_sql(format('ARRAY[%s]', key_s), 'changed', '(SELECT (NEW).*)', filter),
            E'\n    END IF;\n    IF TG_OP <> ''INSERT'' THEN\n        ', tbl_repl._collect_sql(format('ARRAY[%s]', key_s), 'former', '(SELECT (OLD).*)', filter),
            E'\n        IF TG_OP = ''DELETE'' THEN\n            changed := former;\n            former := NULL;\n',
            E'        ELSIF former = changed THEN\n            former := NULL;\n        END IF;\n    END IF;') END
$function$;
COMMENT ON FUNCTION tbl_repl._capture_keys_sql(text, text, text, text) IS
    'statements of a trigger function that take the keys of what was written: as text, native_s: as they are where that is quicker';

CREATE OR REPLACE FUNCTION tbl_repl._capture_olds_sql(
    capture text,
    key_s   text,
    old_s   text,
    absent  text
)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format(CASE WHEN capture = 'statement' THEN
$body$    IF TG_OP = 'INSERT' THEN
        SELECT array_agg(%1$s), array_agg(%3$s) INTO changed, olds FROM new_rows AS s;
    ELSIF TG_OP = 'DELETE' THEN
        SELECT array_agg(%1$s), array_agg(%2$s) INTO changed, olds FROM old_rows AS s;
    ELSE
        SELECT array_agg(n.k), array_agg(coalesce(o.v, %3$s)) INTO changed, olds
        FROM (SELECT %1$s AS k FROM new_rows AS s) AS n LEFT JOIN (SELECT %1$s AS k, %2$s AS v FROM old_rows AS s) AS o ON o.k = n.k;
        SELECT array_agg(o.k), array_agg(o.v) INTO former, former_olds
        FROM (SELECT %1$s AS k, %2$s AS v FROM old_rows AS s) AS o LEFT JOIN unnest(changed) AS n (k) ON n.k = o.k WHERE n.k IS NULL;
    END IF;$body$ ELSE
$body$    IF TG_OP <> 'DELETE' THEN
        SELECT ARRAY[%1$s], ARRAY[%3$s] INTO changed, olds FROM (SELECT (NEW).*) AS s;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        SELECT ARRAY[%1$s], ARRAY[%2$s] INTO former, former_olds FROM (SELECT (OLD).*) AS s;
        IF TG_OP = 'DELETE' OR former = changed THEN
            changed := former;
            olds := former_olds;
            former := NULL;
        END IF;
    END IF;$body$ END, key_s, old_s, absent)
$function$;
COMMENT ON FUNCTION tbl_repl._capture_olds_sql(text, text, text, text) IS
    'statements of a trigger function that take the keys, and what a conflict policy needs of the old rows';

-- Whether what appliers write into a table concerns us: it goes on to other nodes, or may meet a change made here.
CREATE OR REPLACE FUNCTION tbl_repl._carries(source_id integer)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT EXISTS (SELECT FROM tbl_repl.target AS t
                   WHERE t.source_id = _carries.source_id AND (t.forward = 'any' OR t.remote ->> 'node' IS NOT NULL))
$function$;
COMMENT ON FUNCTION tbl_repl._carries(integer) IS 'whether changes made by appliers are captured, too';

-- Once there is a row trigger that fires for appliers, too, it stays (see _drop_triggers).
CREATE OR REPLACE FUNCTION tbl_repl._takes_any(source_id integer)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT tbl_repl._carries(source_id)
        OR EXISTS (SELECT FROM tbl_repl._capture_triggers(source_id) AS h WHERE h.tgname = format('_tbl_repl_%s_any', source_id))
$function$;
COMMENT ON FUNCTION tbl_repl._takes_any(integer) IS 'whether the row trigger of a table fires for appliers, too';

-- A filter that fails on a row must not fail the application: then all keys are taken, and what the failure means
-- is decided where they are shipped.
CREATE OR REPLACE FUNCTION tbl_repl._collect_sql(
    listing  text,
    variable text,
    rows     text,
    filter   text
)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN filter IS NULL THEN format('SELECT %s INTO %s FROM %s AS s;', listing, variable, rows)
                ELSE format(E'BEGIN\n            SELECT %1$s INTO %2$s FROM %3$s AS s WHERE %4$s;\n'
                            '        EXCEPTION WHEN assert_failure OR OTHERS THEN\n            SELECT %1$s INTO %2$s FROM %3$s AS s;\n        END;',
                            listing, variable, rows, filter) END
$function$;
COMMENT ON FUNCTION tbl_repl._collect_sql(text, text, text, text) IS
    'statement of a trigger function that takes the keys of the rows that pass the filter';

-- Capture is for changes made here; what an applier of tbl_repl writes carries its origin.  The function looks for
-- it; a WHEN clause is set up anew by every statement and costs more, and pays only where there is a call per row.
CREATE OR REPLACE FUNCTION tbl_repl._trigger_sql(source_id integer)
RETURNS TABLE (table_name regclass, trigger_name name, statement text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    WITH s AS (SELECT * FROM tbl_repl.source AS x WHERE x.source_id = _trigger_sql.source_id),
    parts AS (
        SELECT s.source_table AS rel FROM s
        UNION
        SELECT t.relid FROM s, pg_partition_tree(s.source_table) AS t WHERE s.capture = 'row' AND t.isleaf
    ),
    wanted AS (
        SELECT s.source_table AS rel, v.suffix, v.event, v.referencing
        FROM s, (VALUES
            ('insert', 'AFTER INSERT', 'REFERENCING NEW TABLE AS new_rows'),
            ('update', 'AFTER UPDATE', 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'),
            ('delete', 'AFTER DELETE', 'REFERENCING OLD TABLE AS old_rows')) AS v (suffix, event, referencing)
        WHERE s.capture = 'statement'
        UNION ALL
        SELECT s.source_table, CASE WHEN tbl_repl._takes_any(s.source_id) THEN 'any' ELSE 'row' END, 'AFTER INSERT OR UPDATE OR DELETE', NULL
        FROM s WHERE s.capture = 'row'
        UNION ALL
        SELECT s.source_table, 'truncate', 'AFTER TRUNCATE', NULL FROM s
        UNION ALL
        SELECT p.rel, 'truncate_keys', 'BEFORE TRUNCATE', NULL
        FROM parts AS p, s
        WHERE s.capture = 'row' OR tbl_repl._needs_truncated_keys(s.source_id)
    )
    SELECT w.rel, format('_tbl_repl_%s_%s', source_id, w.suffix)::name,
           concat_ws(' ', format('CREATE TRIGGER %I %s ON %s', format('_tbl_repl_%s_%s', source_id, w.suffix), w.event, w.rel),
                     w.referencing,
                     CASE WHEN w.suffix IN ('row', 'any') THEN 'FOR EACH ROW' ELSE 'FOR EACH STATEMENT' END,
                     CASE WHEN w.suffix = 'row' THEN 'WHEN (nullif(current_setting(''tbl_repl.origin'', true), '''') IS NULL)' END,
                     format('EXECUTE FUNCTION tbl_repl.%I()', format('capture_%s', source_id)))
    FROM wanted AS w
    ORDER BY w.rel::text, w.suffix
$function$;
COMMENT ON FUNCTION tbl_repl._trigger_sql(integer) IS
    'the triggers a replicated table has to have, and the statements that create them';

-- Above READ COMMITTED a transaction may see older definitions than those its triggers are made for: defined, the direct
-- targets of the table, as target_id:generation:mode.  No definition changes any more once the table is written.  For what it does
-- not see tolerant targets queue, and sync ones, which could not be shipped to, fail it; an older definition of a target that
-- it does see is turned away by _may_ship.
-- Returns whether anything is left to be done at commit.
-- SECURITY DEFINER: called by the capture function on behalf of any writer.
CREATE OR REPLACE FUNCTION tbl_repl._capture_by_snapshot(
    source_id integer,
    defined   text[],
    op        "char",
    keys      text[],
    olds      text[] DEFAULT NULL
)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item record;
BEGIN
    FOR item IN
        SELECT d.parts[1]::integer AS target_id, d.parts[3] AS mode
        FROM (SELECT string_to_array(u, ':') AS parts FROM unnest(defined) AS u) AS d
        WHERE NOT EXISTS (SELECT FROM tbl_repl.target AS t WHERE t.target_id = d.parts[1]::integer AND t.generation = d.parts[2]::integer)
    LOOP
        IF item.mode = 'sync' THEN
            RAISE EXCEPTION USING
                ERRCODE = 'serialization_failure',
                MESSAGE = format('could not serialize access due to a new definition of sync target %s', item.target_id),
                DETAIL  = 'It was added or altered after the snapshot of this transaction was taken.',
                HINT    = 'Try the transaction again.';
        END IF;
        INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count, olds)
        SELECT h.segment, source_id, item.target_id, op, keys, coalesce(cardinality(keys), 1), olds
        FROM tbl_repl.queue_head AS h;
    END LOOP;
    RETURN current_setting('transaction_isolation') <> 'serializable' OR tbl_repl._queue_serializable(source_id, op, keys, olds);
END
$function$;
COMMENT ON FUNCTION tbl_repl._capture_by_snapshot(integer, text[], "char", text[], text[]) IS
    'keeps what a transaction above READ COMMITTED changes for targets that it does not see';

-- Under SERIALIZABLE our own reads at commit may be taken for conflicts, and the transaction may still fail when the
-- target has committed: so tolerant targets queue, and sync ones are shipped to (returns true) only where a receipt
-- heals that.
-- No lock queue: status is not looked at again, and a drainer looks for pending rows also while it is ok.
CREATE OR REPLACE FUNCTION tbl_repl._queue_serializable(
    source_id integer,
    op        "char",
    keys      text[],
    olds      text[]
)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    refusing record;
BEGIN
    SELECT s.source_table, t.server INTO refusing
    FROM tbl_repl.target AS t
    JOIN tbl_repl.target_state AS st USING (target_id)
    JOIN tbl_repl.source AS s USING (source_id)
    WHERE t.source_id = _queue_serializable.source_id AND t.mode = 'sync' AND st.status = 'ok' AND NOT t.receipts
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = format('table %s has a sync target and cannot be written under SERIALIZABLE', refusing.source_table),
            DETAIL  = format('The commit on server %I could not be taken back after a serialization failure here.', refusing.server),
            HINT    = 'Install tbl_repl on the target, use READ COMMITTED or REPEATABLE READ, or make the target tolerant or async.';
    END IF;
    INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count, olds)
    SELECT h.segment, t.source_id, t.target_id, _queue_serializable.op, _queue_serializable.keys,
           coalesce(cardinality(_queue_serializable.keys), 1), _queue_serializable.olds
    FROM tbl_repl.target AS t JOIN tbl_repl.target_state AS st USING (target_id), tbl_repl.queue_head AS h
    WHERE t.source_id = _queue_serializable.source_id AND t.mode <> 'async' AND NOT (t.mode = 'sync' AND st.status = 'ok');
    RETURN EXISTS (SELECT FROM tbl_repl.target AS t JOIN tbl_repl.target_state AS st USING (target_id)
                   WHERE t.source_id = _queue_serializable.source_id AND t.mode = 'sync' AND st.status = 'ok');
END
$function$;
COMMENT ON FUNCTION tbl_repl._queue_serializable(integer, "char", text[], text[]) IS
    'queues what a SERIALIZABLE transaction changed for tolerant targets; whether there are sync ones; 0A000 for those without receipts';

-- Creates or replaces what _capture_sql and _trigger_sql say, drops triggers that are in the way.
-- only_function: for who has no right on the table.  With fewer targets the triggers that are there are enough.
CREATE OR REPLACE FUNCTION tbl_repl._rebuild_capture(source_id integer, only_function boolean DEFAULT false)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item record;
BEGIN
    IF NOT only_function THEN
        -- it may have become a partition
        UPDATE tbl_repl.source AS s SET capture = 'row'
        WHERE s.source_id = _rebuild_capture.source_id AND s.capture = 'statement' AND tbl_repl._capture_kind(s.source_table) = 'row';
    END IF;
    -- One of another role (a restore without owners) goes with its triggers, and comes again as the caller's.
    IF NOT only_function AND EXISTS (SELECT FROM pg_proc AS f WHERE f.pronamespace = 'tbl_repl'::regnamespace AND f.proname = format('capture_%s', source_id)
                                     AND NOT pg_has_role(current_user, f.proowner, 'USAGE')) THEN
        PERFORM tbl_repl._drop_triggers(source_id, true);
        PERFORM tbl_repl._drop_orphans(NULL, source_id);
    END IF;
    EXECUTE tbl_repl._capture_sql(source_id);
    EXECUTE format('REVOKE ALL ON FUNCTION tbl_repl.%I() FROM PUBLIC', format('capture_%s', source_id));
    EXECUTE format('COMMENT ON FUNCTION tbl_repl.%I() IS %L', format('capture_%s', source_id),
                   (SELECT format('captures changes of table %s', s.source_table) FROM tbl_repl.source AS s
                    WHERE s.source_id = _rebuild_capture.source_id));
    IF only_function THEN
        RETURN;
    END IF;
    FOR item IN
        SELECT w.statement FROM tbl_repl._trigger_sql(source_id) AS w
        WHERE NOT EXISTS (SELECT FROM pg_trigger AS g WHERE g.tgrelid = w.table_name AND g.tgname = w.trigger_name)
    LOOP
        EXECUTE item.statement;
    END LOOP;
    PERFORM tbl_repl._drop_triggers(source_id, false);
END
$function$;
COMMENT ON FUNCTION tbl_repl._rebuild_capture(integer, boolean) IS
    'makes trigger function and triggers of a replicated table what the catalog says';

-- Not everything: those on tables that are none of ours any more, or of another kind.  Those that only some definitions of
-- targets need stay until the last target goes, and do nothing: to drop one takes ACCESS EXCLUSIVE, for which we would wait
-- for who has read the table, and he, when he writes it, for us.
CREATE OR REPLACE FUNCTION tbl_repl._drop_triggers(source_id integer, everything boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item record;
BEGIN
    FOR item IN
        SELECT * FROM tbl_repl._capture_triggers(source_id) AS h
        WHERE everything OR NOT EXISTS (
            SELECT FROM tbl_repl._trigger_sql(source_id) AS w
            WHERE w.table_name = h.rel AND (w.trigger_name = h.tgname OR h.tgname ~ '_truncate_keys$' OR h.tgname ~ '_row$' AND w.trigger_name ~ '_any$'))
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', item.tgname, item.rel);
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._drop_triggers(integer, boolean) IS
    'drops the capture triggers of a table that it need not have, or all';

-- Without the clones that PostgreSQL makes for partitions; with those that a partition kept when it was detached.
CREATE OR REPLACE FUNCTION tbl_repl._capture_triggers(source_id integer)
RETURNS TABLE (rel regclass, tgname name)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT g.tgrelid::regclass, g.tgname
    FROM pg_trigger AS g JOIN pg_proc AS f ON f.oid = g.tgfoid
    WHERE f.pronamespace = 'tbl_repl'::regnamespace AND f.proname = format('capture_%s', source_id) AND g.tgparentid = 0
    ORDER BY g.tgrelid::regclass::text, g.tgname
$function$;
COMMENT ON FUNCTION tbl_repl._capture_triggers(integer) IS 'the capture triggers that a table and its partitions have';

-- Statement triggers of a partition do not fire for what is written through its parent, nor those of a parent for its partitions.
CREATE OR REPLACE FUNCTION tbl_repl._capture_kind(source_table regclass)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN c.relkind = 'p' OR c.relispartition THEN 'row' ELSE 'statement' END FROM pg_class AS c WHERE c.oid = source_table
$function$;
COMMENT ON FUNCTION tbl_repl._capture_kind(regclass) IS 'which triggers see every change of a table';

-- With its triggers, for which no right on the table is needed; whoever has written it is waited for.
CREATE OR REPLACE FUNCTION tbl_repl._drop_capture(source_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp SET client_min_messages = warning
AS $function$
BEGIN
    EXECUTE format('DROP FUNCTION IF EXISTS tbl_repl.%I() CASCADE', format('capture_%s', source_id));
END
$function$;
COMMENT ON FUNCTION tbl_repl._drop_capture(integer) IS 'drops the trigger function of a replicated table, and its triggers';
