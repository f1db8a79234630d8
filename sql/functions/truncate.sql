-- Truncate: the one change that is not state.
--
-- A row written after a TRUNCATE may be shipped before it.  So it is shipped as "make equal": the target's table is emptied
-- and filled with every row of the source, in one snapshot; or, where others have rows in it, the rows that were there are
-- deleted one by one, whose keys the triggers keep.

-- Where a target shares its table with others, or sees only some rows, TRUNCATE means these keys;
-- so it does for a single partition.  The root adds the rows of partitions that have no such trigger yet.
CREATE OR REPLACE FUNCTION tbl_repl._capture_truncate_sql(
    source tbl_repl.source,
    key_s  text,
    old_s  text,
    store  text
)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    needed boolean := tbl_repl._needs_truncated_keys(source.source_id);
    looks  text[];  -- which rows a TRUNCATE removes
BEGIN
    SELECT array_agg(format(E'EXECUTE format(CASE WHEN EXISTS (SELECT FROM pg_class AS c WHERE c.oid = TG_RELID AND c.relkind = ''p'')\n'
               '                                THEN %L ELSE %L END, TG_RELID::regclass, TG_NAME) INTO changed, olds;\n',
               format('SELECT array_agg(%s), %s FROM %%s AS s WHERE NOT EXISTS (SELECT FROM pg_trigger AS g WHERE g.tgrelid = s.tableoid AND g.tgname = %%L)', k.listing, o.listing),
               format('SELECT array_agg(%s), %s FROM ONLY %%s AS s', k.listing, o.listing)) ORDER BY o.n)
    INTO looks
    FROM unnest(ARRAY[format('array_agg(%s)', replace(old_s, '%', '%%')), 'NULL::text[]']) WITH ORDINALITY AS o (listing, n), replace(key_s, '%', '%%') AS k (listing)
    WHERE o.n = 2 OR old_s IS NOT NULL;
    IF old_s IS NOT NULL THEN
        looks[1] := concat(E'BEGIN\n                ', looks[1], E'            EXCEPTION WHEN assert_failure OR OTHERS THEN\n                ', looks[2], E'            END;\n');
    END IF;
    RETURN concat(
        E'    IF TG_OP = ''TRUNCATE'' THEN\n        IF TG_WHEN = ''BEFORE'' THEN\n',
        CASE WHEN source.capture = 'statement' AND NOT needed THEN E'            RETURN NULL;\n' ELSE concat(
            -- not visible to a snapshot that is older than the first target
            format(E'            SELECT s.source_table INTO root FROM tbl_repl.source AS s WHERE s.source_id = %s;\n', source.source_id),
            CASE WHEN source.capture = 'row' THEN concat(
                E'            IF root = TG_RELID THEN\n',
                format(E'                PERFORM set_config(''tbl_repl.truncating'', ''%s'', true);\n', source.source_id),
                CASE WHEN NOT needed THEN E'                RETURN NULL;\n' END,
                E'            END IF;\n') END,
            -- one that was a partition is somebody else's table
            E'            IF root <> TG_RELID AND root NOT IN (SELECT a.relid FROM pg_partition_ancestors(TG_RELID) AS a) THEN\n'
             '                RETURN NULL;\n            END IF;\n',
            -- rows that the snapshot does not show go, too, and their keys would be missing; not where the whole table
            -- goes with its partitions, and no key is needed
            CASE WHEN EXISTS (SELECT FROM tbl_repl.target AS t WHERE t.source_id = source.source_id AND 'truncate' = ANY (t.operations)) THEN concat(
                E'            IF current_setting(''transaction_isolation'') <> ''read committed''',
                CASE WHEN NOT needed THEN format(' AND current_setting(''tbl_repl.truncating'', true) IS DISTINCT FROM ''%s''', source.source_id) END,
                E' THEN\n                PERFORM tbl_repl._refuse_truncate(TG_RELID);\n            END IF;\n') END,
            E'            ', looks[1],
            E'            IF changed IS NULL THEN RETURN NULL; END IF;\n') END,
        CASE WHEN source.capture = 'row' THEN E'        ELSE\n            PERFORM set_config(''tbl_repl.truncating'', '''', true);\n' END,
        E'        END IF;\n        ',
        concat_ws(E'\n        ', replace(tbl_repl._filled_in(store, '''T''', 'changed', 'olds'), E'\n', E'\n        '),
                  tbl_repl._bury_sql(source, 'changed', 'olds', 'true')),
        E'\n        RETURN NULL;\n    END IF;');
END
$function$;
COMMENT ON FUNCTION tbl_repl._capture_truncate_sql(tbl_repl.source, text, text, text) IS
    'statements of a trigger function for TRUNCATE';

-- Does any target need the keys that a TRUNCATE of the whole table removes?
CREATE OR REPLACE FUNCTION tbl_repl._needs_truncated_keys(source_id integer)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT EXISTS (SELECT FROM tbl_repl.target AS t WHERE t.source_id = _needs_truncated_keys.source_id AND tbl_repl._truncates_by_key(t.target_id))
$function$;
COMMENT ON FUNCTION tbl_repl._needs_truncated_keys(integer) IS
    'whether a TRUNCATE of a replicated table is captured by the keys of its rows';

-- A TRUNCATE of the source empties the target's table only where nothing else can be in it.
CREATE OR REPLACE FUNCTION tbl_repl._truncates_by_key(target_id integer)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT t.filter_expr IS NOT NULL OR t.forward = 'any' OR t.on_conflict <> 'overwrite'
        OR s.source_table IN (SELECT c.oid FROM pg_class AS c WHERE c.relispartition)
        OR EXISTS (SELECT FROM tbl_repl.target AS o
                   WHERE o.server = t.server AND o.dst_schema = t.dst_schema AND o.dst_name = t.dst_name
                     AND o.target_id <> t.target_id)
    FROM tbl_repl.target AS t
    JOIN tbl_repl.source AS s USING (source_id)
    WHERE t.target_id = _truncates_by_key.target_id
$function$;
COMMENT ON FUNCTION tbl_repl._truncates_by_key(integer) IS
    'whether a TRUNCATE is shipped as deletion of the rows that were there';

CREATE OR REPLACE FUNCTION tbl_repl._refuse_truncate(relation oid)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = 'feature_not_supported',
        MESSAGE = format('cannot TRUNCATE table %s in a transaction above READ COMMITTED', relation::regclass),
        DETAIL  = 'A target loses the rows of this table one by one, and the snapshot of this transaction may not show them all.',
        HINT    = 'TRUNCATE it in a READ COMMITTED transaction, or DELETE its rows.';
END
$function$;
COMMENT ON FUNCTION tbl_repl._refuse_truncate(oid) IS
    'refuses a TRUNCATE whose keys the snapshot of the transaction may not show';

-- The target itself and those with the same place, as far as a TRUNCATE means their whole table.
CREATE OR REPLACE FUNCTION tbl_repl._truncate_whole(target tbl_repl.target)
RETURNS integer[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT array_agg(t.target_id ORDER BY t.target_id)
    FROM tbl_repl.target AS t
    WHERE (t.target_id = target.target_id
           OR (t.server = target.server AND t.dst_schema = target.dst_schema AND t.dst_name = target.dst_name))
      AND NOT tbl_repl._truncates_by_key(t.target_id)
$function$;
COMMENT ON FUNCTION tbl_repl._truncate_whole(tbl_repl.target) IS
    'targets that a change of definition may take the right to empty their table';

-- _check_truncates(targets): refuses (55000) a definition under which the target's table holds more than the source's
-- rows, as long as a TRUNCATE waits that was recorded without keys: nobody could tell any more which rows it removes.
-- Called when the locks on the tables are held: no such TRUNCATE is under way, and the next one records its keys.
CREATE OR REPLACE FUNCTION tbl_repl._check_truncates(targets integer[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item    record;
    waiting boolean;
BEGIN
    FOR item IN
        SELECT t.target_id, t.server, st.status,
               format('SELECT EXISTS (SELECT FROM %s AND c.op = ''T'' AND c.keys IS NULL AND NOT EXISTS '
                      '(SELECT FROM tbl_repl.change AS k WHERE k.txid = c.txid AND k.source_id = c.source_id AND k.op = ''T'' AND k.keys IS NOT NULL))'
                      ' OR EXISTS (SELECT FROM tbl_repl.stash AS s WHERE s.txid = pg_current_xact_id() AND s.source_id = %s AND s.op = ''T'' AND s.keys IS NULL)',
                      tbl_repl._pending_from(t, tbl_repl._position(t.target_id)), t.source_id) AS query
        FROM tbl_repl.target AS t JOIN tbl_repl.target_state AS st USING (target_id)
        WHERE t.target_id = ANY (targets) AND 'truncate' = ANY (t.operations) AND tbl_repl._truncates_by_key(t.target_id)
    LOOP
        EXECUTE item.query INTO waiting;
        IF waiting THEN
            RAISE EXCEPTION USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('a TRUNCATE waits to be shipped to target %s', item.target_id),
                DETAIL  = 'It means the whole table there; with a filter, or rows of another table in it, it could not be told any more which rows it removes.',
                HINT    = CASE WHEN item.status = 'paused' THEN format('First SELECT tbl_repl.resume_target(%s); CALL tbl_repl.drain();', item.target_id)
                               ELSE 'First CALL tbl_repl.drain();' END;
        END IF;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_truncates(integer[]) IS
    'refuses to share or filter a target for which a TRUNCATE of the whole table is queued';

-- _clear_kept(conn, timeout, targets, by_target): deletes what only the tables of the targets have, without the rows that others there
-- refer to: left_there, as far as their keys can be those of a row here.  Children first, and again as long as that frees any;
-- a chain within one table is followed so far.
CREATE OR REPLACE FUNCTION tbl_repl._clear_kept(
    conn    text,
    timeout interval,
    targets integer[],
    INOUT by_target jsonb,
    OUT deleted     bigint,
    OUT left_there  tbl_repl.poison[]
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target  tbl_repl.target%ROWTYPE;
    cleared record;
    freed   bigint;
BEGIN
    deleted := 0;
    left_there := '{}';
    FOR pass IN 1 .. 32 LOOP
        EXIT WHEN cardinality(targets) = 0;
        freed := 0;
        left_there := '{}';
        FOR target IN SELECT t.* FROM tbl_repl.target AS t JOIN tbl_repl.source AS s USING (source_id)
                      WHERE t.target_id = ANY (targets) ORDER BY s.fk_rank DESC, t.target_id LOOP
            cleared := tbl_repl._clear_table(conn, timeout, target);
            freed := freed + cleared.deleted;
            by_target := tbl_repl._add_count(by_target, target.target_id, cleared.deleted);
            left_there := left_there || cleared.left_there;
        END LOOP;
        deleted := deleted + freed;
        EXIT WHEN freed = 0;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._clear_kept(text, interval, integer[], jsonb) IS
    'deletes the rows that only the target has, but for those that others there refer to';

CREATE OR REPLACE FUNCTION tbl_repl._clear_table(
    conn    text,
    timeout interval,
    target  tbl_repl.target,
    OUT deleted    bigint,
    OUT left_there tbl_repl.poison[]
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    unreferred text;
    shape      jsonb;
    listed     jsonb;
    last_key   jsonb;
    forms      text[];
    gone       text[];
    bad        tbl_repl.poison[];
    worked     boolean;
    context    text;
BEGIN
    deleted := 0;
    left_there := '{}';
    unreferred := tbl_repl._call(conn, format($remote$
        SELECT coalesce(pg_catalog.string_agg(pg_catalog.format(' AND NOT EXISTS (SELECT FROM %%s AS c WHERE %%s%%s)', f.conrelid::pg_catalog.regclass, (
                   SELECT pg_catalog.string_agg(pg_catalog.format('c.%%I = d.%%I', h.attname, p.attname), ' AND ')
                   FROM pg_catalog.generate_subscripts(f.conkey, 1) AS k (n)
                   JOIN pg_catalog.pg_attribute AS h ON h.attrelid = f.conrelid AND h.attnum = f.conkey[k.n]
                   JOIN pg_catalog.pg_attribute AS p ON p.attrelid = f.confrelid AND p.attnum = f.confkey[k.n]),
                   CASE WHEN f.conrelid = f.confrelid THEN ' AND (c.tableoid <> d.tableoid OR c.ctid <> d.ctid)' END), ''), '')
        FROM pg_catalog.pg_constraint AS f
        WHERE f.contype = 'f' AND f.confrelid = %L::pg_catalog.regclass AND f.conparentid = 0 AND f.confdeltype IN ('a', 'r')$remote$,
        tbl_repl._dst_table(target)), clock_timestamp() + timeout);
    -- it sets a search_path, to the end of the transaction: not for triggers there
    PERFORM tbl_repl._call(conn, 'SAVEPOINT tbl_repl', clock_timestamp() + timeout);
    shape := tbl_repl._target_shape(target, conn);
    PERFORM tbl_repl._call(conn, 'ROLLBACK TO tbl_repl; RELEASE tbl_repl', clock_timestamp() + timeout);
    LOOP
        listed := tbl_repl._call(conn, tbl_repl._target_page_sql(target, last_key, NULL, tbl_repl._rows_per_message()), clock_timestamp() + timeout);
        EXIT WHEN listed IS NULL;
        last_key := listed -> -1;
        forms := tbl_repl._keys_from_there(target, target.dst_keys, conn, shape, listed);
        gone := tbl_repl._without_row(target.target_id, array_remove(forms, NULL));
        SELECT jsonb_agg(listed -> (f.n - 1)::integer ORDER BY f.n) INTO listed
        FROM unnest(forms) WITH ORDINALITY AS f (form, n) WHERE f.form IS NULL OR f.form = ANY (gone);
        CONTINUE WHEN listed IS NULL;
        PERFORM tbl_repl._call(conn, 'SAVEPOINT tbl_repl', clock_timestamp() + timeout);
        worked := true;
        BEGIN
            deleted := deleted + tbl_repl._call(conn, format(
                'WITH x AS (DELETE FROM %s AS d USING pg_catalog.json_array_elements(%L) AS e (k) WHERE %s%s RETURNING 1) SELECT pg_catalog.count(*) FROM x',
                tbl_repl._dst_table(target), listed, tbl_repl._has_listed_key(target), unreferred), clock_timestamp() + timeout)::bigint;
        EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
            GET STACKED DIAGNOSTICS context = PG_EXCEPTION_CONTEXT;
            IF SQLSTATE ~ '^(08|57P)' OR (SQLSTATE = '57014' AND NOT tbl_repl._is_too_slow(SQLSTATE, context, conn)) THEN
                RAISE;
            END IF;
            worked := false;
        END;
        PERFORM tbl_repl._call(conn, CASE WHEN worked THEN 'RELEASE tbl_repl' ELSE 'ROLLBACK TO tbl_repl; RELEASE tbl_repl' END, clock_timestamp() + timeout);
        IF worked THEN
            listed := tbl_repl._call(conn, format('SELECT pg_catalog.json_agg(e.k) FROM %s', tbl_repl._by_key_list(target, listed)), clock_timestamp() + timeout);
            forms := tbl_repl._keys_from_there(target, target.dst_keys, conn, shape, listed);
            left_there := left_there || ARRAY(SELECT ROW(target.target_id, f, true, '23503', 'rows on the target refer to it, which stay', NULL)::tbl_repl.poison
                                              FROM unnest(forms) AS f WHERE f IS NOT NULL);
        ELSIF cardinality(gone) > 0 THEN
            -- which rows are to blame
            bad := tbl_repl._apply_keys(conn, timeout, target.target_id, true, gone, false, NULL);
            deleted := deleted + cardinality(gone) - cardinality(bad);
            left_there := left_there || bad;
        END IF;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._clear_table(text, interval, tbl_repl.target) IS
    'deletes the rows that only the table of one target has, but for those that others there refer to';

-- SQLSTATE and message with which the target refuses to empty tables, NULL when it has done so; the remote transaction goes on.
CREATE OR REPLACE FUNCTION tbl_repl._refused_truncate(
    conn    text,
    loads   tbl_repl.load[],
    timeout interval
)
RETURNS text[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    refused text[];
    context text;
BEGIN
    BEGIN
        PERFORM tbl_repl._truncate(conn, loads, timeout);
        RETURN NULL;
    EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
        GET STACKED DIAGNOSTICS context = PG_EXCEPTION_CONTEXT;
        IF tbl_repl._is_transient(SQLSTATE) AND NOT tbl_repl._is_too_slow(SQLSTATE, context, conn) THEN
            RAISE;
        END IF;
        refused := ARRAY[SQLSTATE, SQLERRM];
    END;
    PERFORM tbl_repl._call(conn, 'ROLLBACK TO tbl_repl', clock_timestamp() + timeout);
    RETURN refused;
END
$function$;
COMMENT ON FUNCTION tbl_repl._refused_truncate(text, tbl_repl.load[], interval) IS
    'empties the targets'' tables; why the target refuses that';
