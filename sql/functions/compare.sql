-- Compare: what a target holds against what it should hold, and repair.
--
-- Promises to find every difference that the target's filter, columns, map and operations do not explain,
-- and that is not queued; in bounded memory, each message to the target within its timeout.  Repairing is
-- left to shipping: what is found is queued.
--
-- Two passes.  The first goes through the source's keys, chunk by chunk, in its own order.  Both sides make a
-- checksum over the rows of the same range of keys; equal ones end the matter, and nothing but two keys and
-- the checksum has travelled.  Else both make one over the rows with exactly these keys (other sources may feed the
-- same table); else the source's values are sent, for the target to say which of its rows differ: it alone knows what a
-- value becomes in its column.
--
-- The second looks for rows that only the target has, in the target's own order: where the first found a range
-- that is not equal, and after the last key.  Why that is enough although both sides may sort differently:
-- as long as the bounds of the ranges ascend in the target's order too, the ranges are a partition of all keys
-- there, and a range whose checksum is equal holds exactly the source's rows of that chunk.  Where the bounds do
-- not ascend, or the target has no index in that order, it goes through all of the target's keys.
--
-- Pieces can be compared by several sessions at once, as the command line does: each starts where another ends.
--
-- Writers go on meanwhile.  The sides are read one after the other, so what seems to differ is looked at once
-- more before it is reported.

-- compare_target(target_id): runs as its caller, who must be a member of the target's owner; values are
-- read as the owner.
-- Errors: 42704, 42501; 55000 while the initial copy is under way; 08* and what the target answers.
CREATE OR REPLACE FUNCTION tbl_repl.compare_target(target_id integer)
RETURNS TABLE (difference text, key jsonb)
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT c.difference, c.key FROM tbl_repl._compare(target_id) AS c
$function$;
COMMENT ON FUNCTION tbl_repl.compare_target(integer) IS
    'rows in which a target is not what it should be: missing_on_target, extra_on_target, different; what is queued is not reported';

-- repair_target(target_id, delete_extra): queues what compare_target finds; replay, drain or the worker
-- ships it.  Returns how many rows.
CREATE OR REPLACE FUNCTION tbl_repl.repair_target(target_id integer, delete_extra boolean DEFAULT false)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target     tbl_repl.target%ROWTYPE := tbl_repl._own_target(target_id);
    item       record;
    keys       text[] := '{}';
    queued     bigint := 0;
    unreachable bigint := 0;
BEGIN
    FOR item IN
        SELECT c.key_text FROM tbl_repl._compare(target_id) AS c
        WHERE c.difference <> 'extra_on_target' OR delete_extra
    LOOP
        IF item.key_text IS NULL THEN
            unreachable := unreachable + 1;
            CONTINUE;
        END IF;
        keys := array_append(keys, item.key_text);
        IF cardinality(keys) = tbl_repl._rows_per_message() THEN
            PERFORM tbl_repl._queue_keys(target, keys);
            queued := queued + cardinality(keys);
            keys := '{}';
        END IF;
    END LOOP;
    IF cardinality(keys) > 0 THEN
        PERFORM tbl_repl._queue_keys(target, keys);
        queued := queued + cardinality(keys);
    END IF;
    PERFORM tbl_repl._note_timeline(target_id);
    IF unreachable > 0 THEN
        RAISE WARNING USING
            MESSAGE = format('%s rows of table %s on the target have keys that no row of the source can have', unreachable, tbl_repl._dst_table(target)),
            HINT    = 'Delete them there; compare_target lists them.';
    END IF;
    RETURN queued;
END
$function$;
COMMENT ON FUNCTION tbl_repl.repair_target(integer, boolean) IS
    'queues the rows that compare_target finds, those that only the target has if delete_extra; returns how many';

-- For the command line, which repairs piece by piece.
CREATE OR REPLACE FUNCTION tbl_repl._queue_found(target_id integer, keys text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target tbl_repl.target%ROWTYPE := tbl_repl._own_target(target_id);
    size   integer := tbl_repl._rows_per_message();
BEGIN
    PERFORM tbl_repl._queue_keys(target, keys[n:n + size - 1]) FROM generate_series(1, cardinality(keys), size) AS n;
END
$function$;
COMMENT ON FUNCTION tbl_repl._queue_found(integer, text[]) IS 'queues rows of a target in which it differs';

-- _compare(target_id): key_text: the key as it is queued; NULL for a row of the target whose key none of
-- the source can have.
CREATE OR REPLACE FUNCTION tbl_repl._compare(target_id integer)
RETURNS TABLE (difference text, key_text text, key jsonb)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    chunk   record;
    last    text;
    ordered boolean := true;
    afters  text[] := '{}';
    uptos   text[] := '{}';
BEGIN
    PERFORM tbl_repl._compare_begin(target_id);
    FOR chunk IN SELECT r.* FROM tbl_repl._compare_rows(target_id, NULL, NULL) AS r LOOP
        RETURN QUERY SELECT d ->> 'difference', d ->> 'key_text', d -> 'key' FROM jsonb_array_elements(chunk.differences) AS d;
        ordered := ordered AND chunk.in_order;
        IF NOT chunk.is_equal AND ordered THEN
            IF uptos[cardinality(uptos)] = chunk.after THEN
                uptos[cardinality(uptos)] := chunk.upto;
            ELSE
                afters := array_append(afters, chunk.after);
                uptos := array_append(uptos, chunk.upto);
            END IF;
        END IF;
        last := chunk.upto;
    END LOOP;
    IF NOT ordered THEN
        afters := '{}';
        uptos := '{}';
        last := NULL;
    END IF;
    RETURN QUERY
        SELECT 'extra_on_target', e.key_text, e.key
        FROM (SELECT u.after, u.upto, u.n FROM unnest(afters, uptos) WITH ORDINALITY AS u (after, upto, n)
              UNION ALL SELECT last, NULL, NULL ORDER BY n) AS r
        CROSS JOIN LATERAL tbl_repl._compare_extra(target_id, r.after, r.upto) AS e;
END
$function$;
COMMENT ON FUNCTION tbl_repl._compare(integer) IS 'compare_target, with the keys as they are queued';

-- Returns how many rows there are to compare: an estimate.
CREATE OR REPLACE FUNCTION tbl_repl._compare_begin(target_id integer)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    PERFORM tbl_repl._own_target(target_id);
    IF EXISTS (SELECT FROM tbl_repl.target_state AS st
               WHERE st.target_id = _compare_begin.target_id AND (st.copy_after IS NOT NULL OR st.status = 'copying')) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('target %s is still being copied', target_id),
            HINT    = 'Compare when the copy has ended: CALL tbl_repl.drain();';
    END IF;
    RETURN (SELECT greatest(0, sum(c.reltuples))::bigint
            FROM tbl_repl.target AS t JOIN tbl_repl.source AS s USING (source_id)
            CROSS JOIN LATERAL (SELECT s.source_table AS relid UNION SELECT p.relid FROM pg_partition_tree(s.source_table) AS p) AS p
            JOIN pg_class AS c ON c.oid = p.relid AND c.relkind <> 'p'
            WHERE t.target_id = _compare_begin.target_id);
END
$function$;
COMMENT ON FUNCTION tbl_repl._compare_begin(integer) IS 'whether a target can be compared, and about how many rows that are';

-- Where the piece that starts after a key ends; upto is NULL where nothing is left.
CREATE OR REPLACE FUNCTION tbl_repl._compare_piece(
    target_id  integer,
    after      text,
    piece_rows integer,
    OUT upto text,
    OUT rows integer
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    page text[];
BEGIN
    EXECUTE format('SELECT tbl_repl.page_%s($1, $2)', target_id) INTO page USING after, piece_rows;
    upto := page[cardinality(page)];
    rows := coalesce(cardinality(page), 0);
END
$function$;
COMMENT ON FUNCTION tbl_repl._compare_piece(integer, text, integer) IS 'the last key of the next piece to compare';

-- _compare_rows(target_id, start, finish): the first pass over the source's keys after one (NULL: from the start) and up to
-- another (NULL: to the end).  A row for each chunk: its bounds; is_equal: there is no difference at all between them,
-- also no row that only the target has; in_order: its bounds ascend on the target too.
CREATE OR REPLACE FUNCTION tbl_repl._compare_rows(target_id integer, start text, finish text)
RETURNS TABLE (after text, upto text, rows integer, is_equal boolean, in_order boolean, differences jsonb)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target   tbl_repl.target%ROWTYPE := tbl_repl._own_target(target_id);
    source   tbl_repl.source%ROWTYPE;
    conn     text;
    shape    jsonb;
    chunk    integer;
    last     text := start;
    here     record;
    there    jsonb;
    page     text[];
    unequal  jsonb;
    expected text[];
    in_vain  integer := 0;
BEGIN
    SELECT * INTO STRICT source FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
    -- what an operation that is not replicated leaves behind is no difference
    expected := array_remove(ARRAY[CASE WHEN 'insert' = ANY (target.operations) THEN 'missing_on_target' END,
                                   CASE WHEN 'update' = ANY (target.operations) THEN 'different' END], NULL);
    conn := tbl_repl._target_connection(target);
    shape := tbl_repl._target_shape(target, conn);
    chunk := tbl_repl._chunk_rows(source.source_table);
    LOOP
        EXECUTE format('SELECT d.keys, d.digest FROM tbl_repl.digest_%s($1, $2, $3) AS d', target.target_id)
        INTO here USING last, finish, chunk;
        after := last;
        IF here.keys IS NULL THEN
            -- the last row has gone meanwhile: what the target has after it would be left out
            IF finish IS NOT NULL AND last IS DISTINCT FROM finish THEN
                upto := finish;
                rows := 0;
                differences := '[]';
                there := tbl_repl._range_digest(target, conn, shape, after, upto, 0);
                in_order := (there ->> 'in_order')::boolean;
                is_equal := in_order AND there ->> 'rows' = '0';
                RETURN NEXT;
            END IF;
            EXIT;
        END IF;
        page := here.keys;
        last := page[cardinality(page)];
        upto := last;
        rows := cardinality(page);
        differences := '[]';
        there := tbl_repl._range_digest(target, conn, shape, after, upto, rows);
        in_order := (there ->> 'in_order')::boolean;
        is_equal := in_order AND coalesce((there ->> 'rows')::integer = rows AND there ->> 'digest' = here.digest, false);
        -- where types differ so does the text of equal rows, and checksums tell nothing
        IF is_equal OR (in_vain < 3 AND tbl_repl._is_same(target, conn, page)) THEN
            in_vain := 0;
            RETURN NEXT;
            CONTINUE;
        END IF;
        unequal := tbl_repl._differences(target, conn, shape, page);
        in_vain := CASE unequal WHEN '{}' THEN in_vain + 1 ELSE 0 END;
        page := tbl_repl._not_pending(target, ARRAY(SELECT p FROM unnest(page) WITH ORDINALITY AS x (p, n)
                                                    WHERE unequal ->> p = ANY (expected) ORDER BY n));
        IF page <> '{}' THEN
            PERFORM pg_sleep(0.002);
            unequal := tbl_repl._differences(target, conn, shape, page);
            page := tbl_repl._not_pending(target, page);
            EXECUTE format('SELECT coalesce(jsonb_agg(jsonb_build_object(''difference'', $1 ->> k.key, ''key_text'', k.key, ''key'', %s) ORDER BY k.n), ''[]'') '
                           'FROM unnest($2) WITH ORDINALITY AS k (key, n) WHERE $1 ->> k.key = ANY ($3)',
                           tbl_repl._key_json_sql(source.source_table, source.key_columns))
            INTO differences USING unequal, page, expected;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._compare_rows(integer, text, text) IS
    'differences of the rows that the source has between two keys, chunk by chunk';

-- _compare_extra(target_id, after, upto): the second pass, over the target's keys in that range.
CREATE OR REPLACE FUNCTION tbl_repl._compare_extra(target_id integer, after text, upto text)
RETURNS TABLE (key_text text, key jsonb)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target   tbl_repl.target%ROWTYPE := tbl_repl._own_target(target_id);
    source   tbl_repl.source%ROWTYPE;
    conn     text;
    shape    jsonb;
    chunk    integer;
    listed   jsonb;
    last_key jsonb := CASE WHEN after IS NOT NULL THEN tbl_repl._key_list(cardinality(target.dst_keys), ARRAY[after]) -> 0 END;
    end_key  jsonb := tbl_repl._key_list(cardinality(target.dst_keys), ARRAY[upto]) -> 0;
BEGIN
    IF NOT 'delete' = ANY (target.operations) THEN
        RETURN;
    END IF;
    SELECT * INTO STRICT source FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
    conn := tbl_repl._target_connection(target);
    shape := tbl_repl._target_shape(target, conn);
    chunk := tbl_repl._chunk_rows(source.source_table);
    LOOP
        listed := tbl_repl._call(conn, tbl_repl._target_page_sql(target, last_key, CASE WHEN upto IS NOT NULL THEN end_key END, chunk),
                                 clock_timestamp() + target.timeout);
        EXIT WHEN listed IS NULL;
        last_key := listed -> -1;
        listed := tbl_repl._unknown_to_all(target, conn, shape, listed);
        CONTINUE WHEN listed = '[]';
        PERFORM pg_sleep(0.002);
        listed := tbl_repl._call(conn, format('SELECT pg_catalog.json_agg(e.k ORDER BY e.n) FROM %s',
                                              tbl_repl._by_key_list(target, jsonb_path_query_array(listed, '$[*].k'))), clock_timestamp() + target.timeout);
        listed := tbl_repl._unknown_to_all(target, conn, shape, coalesce(listed, '[]'));
        RETURN QUERY EXECUTE format(
            'SELECT k.key, coalesce(%s, (SELECT jsonb_object_agg(c, k.e -> ''k'' -> (n - 1)::integer) FROM unnest($2) WITH ORDINALITY AS x (c, n))) '
            'FROM (SELECT e, e ->> ''s'' AS key FROM jsonb_array_elements($1) AS e) AS k', tbl_repl._key_json_sql(source.source_table, source.key_columns))
            USING listed, source.key_columns;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._compare_extra(integer, text, text) IS
    'rows of the target, between two keys, that no target of this node brings there';

-- digest_N(after, upto, count): the next keys in key order that pass the target's filter, and a checksum over what is
-- sent for them: the sum of their hashes, for the target may list them in another order.  NULL where an expression
-- fails on a row; on which is found out where the values are sent.
CREATE OR REPLACE FUNCTION tbl_repl._digest_sql(target_id integer)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format($sql$CREATE OR REPLACE FUNCTION tbl_repl.%I(
    tbl_repl_after text,
    tbl_repl_upto  text,
    tbl_repl_count integer,
    OUT keys       text[],
    OUT digest     text
)
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp%s%s
AS %L$sql$,
        format('digest_%s', t.target_id), E'\n' || nullif(tbl_repl._text_settings(tbl_repl._with_filter(tbl_repl._sent_types(t, s.source_table), t)
            || ARRAY(SELECT p.type_id FROM tbl_repl._key_parts(s.source_table, s.key_columns) AS p)), ''),
        tbl_repl._literal_setting(b.body), b.body)
    FROM tbl_repl.target AS t JOIN tbl_repl.source AS s USING (source_id)
    CROSS JOIN LATERAL (SELECT tbl_repl._with_source_checked(s, format($body$
DECLARE
    bounds text := concat(CASE WHEN tbl_repl_after IS NOT NULL THEN %1$L END, CASE WHEN tbl_repl_upto IS NOT NULL THEN %2$L END, %3$L);
BEGIN
    BEGIN
        EXECUTE concat(%4$L, bounds, ') AS x') INTO keys, digest USING tbl_repl_after, tbl_repl_upto, tbl_repl_count;
    EXCEPTION WHEN assert_failure OR OTHERS THEN
        EXECUTE concat(%5$L, bounds, ') AS x') INTO keys USING tbl_repl_after, tbl_repl_upto, tbl_repl_count;
        digest := NULL;
    END;
END
$body$,
            format(' AND (%s)', tbl_repl._key_after(s.source_table, s.key_columns)),
            format(' AND (%s)', tbl_repl._key_until(s.source_table, s.key_columns)),
            (SELECT format(' ORDER BY %s LIMIT $3', string_agg(format('s.%I', p.name), ', ' ORDER BY p.n))
             FROM tbl_repl._key_parts(s.source_table, s.key_columns) AS p),
            format('SELECT array_agg(x.k), sum(x.h)::text FROM (SELECT %s AS k, hashtextextended(ROW(%s)::text COLLATE "C", 0) AS h FROM %s AS s WHERE %s',
                   tbl_repl._key_text(s.key_columns, 's'),
                   (SELECT string_agg(format('(%s)::text', e), ', ' ORDER BY n) FROM unnest(t.sent_exprs) WITH ORDINALITY AS x (e, n)),
                   s.source_table, CASE WHEN t.filter_expr IS NULL THEN 'true' ELSE format('(%s)', t.filter_expr) END),
            format('SELECT array_agg(x.k) FROM (SELECT %s AS k FROM %s AS s WHERE true', tbl_repl._key_text(s.key_columns, 's'), s.source_table))) AS body) AS b
    WHERE t.target_id = _digest_sql.target_id
$function$;
COMMENT ON FUNCTION tbl_repl._digest_sql(integer) IS
    'text of digest_N, which lists keys of a target with a checksum over the values';

-- The target's side of it: {in_order, rows, digest} of its rows in a range of keys, at most one more than
-- there should be.  in_order is false where the range means nothing there.
CREATE OR REPLACE FUNCTION tbl_repl._range_digest(
    target tbl_repl.target,
    conn   text,
    shape  jsonb,
    after  text,
    upto   text,
    rows   integer
)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    first_key jsonb := CASE WHEN after IS NOT NULL THEN tbl_repl._key_list(cardinality(target.dst_keys), ARRAY[after]) -> 0 END;
    last_key  jsonb := tbl_repl._key_list(cardinality(target.dst_keys), ARRAY[upto]) -> 0;
BEGIN
    IF NOT coalesce((shape -> 0 ->> 'indexed')::boolean, false) THEN
        RETURN '{"in_order": false}';
    END IF;
    RETURN tbl_repl._call(conn, (
        SELECT format('SELECT pg_catalog.json_build_object(''in_order'', %s, ''rows'', pg_catalog.count(x.h), ''digest'', pg_catalog.sum(x.h)::text) '
                      'FROM (SELECT pg_catalog.hashtextextended(ROW(%s)::text COLLATE "C", 0) AS h FROM %s AS d WHERE %s LIMIT %s) AS x',
                      CASE WHEN first_key IS NULL THEN 'true'
                           ELSE tbl_repl._comes_after(
                               array_agg(format('%L::%s%s', last_key ->> (p.n - 1), p.type, ' COLLATE ' || (c.c ->> 'collation')) ORDER BY p.n),
                               array_agg(p.equals ORDER BY p.n), array_agg(p.greater ORDER BY p.n),
                               array_agg(format('%L::%s%s', first_key ->> (p.n - 1), p.type, ' COLLATE ' || (c.c ->> 'collation')) ORDER BY p.n)) END,
                      (SELECT string_agg(format('d.%I::text', n.name), ', ' ORDER BY n.n) FROM unnest(target.sent_columns) WITH ORDINALITY AS n (name, n)),
                      tbl_repl._dst_table(target), tbl_repl._target_range(target, first_key, last_key), rows + 1)
        FROM tbl_repl._dst_key_parts(target) AS p
        JOIN LATERAL (SELECT c FROM jsonb_array_elements(shape) AS c WHERE c ->> 'name' = p.name::text) AS c ON true), clock_timestamp() + target.timeout);
EXCEPTION WHEN data_exception OR integrity_constraint_violation OR undefined_function THEN
    -- a key that the target's column cannot hold, or that is not ordered there
    RETURN '{"in_order": false}';
END
$function$;
COMMENT ON FUNCTION tbl_repl._range_digest(tbl_repl.target, text, jsonb, text, text, integer) IS
    'checksum over the rows that the target has between two keys';

-- Types of the sent columns as the target has them now, in order: [{name, type, base, length, collation, indexed}];
-- indexed: whether an index has the target's keys in their order.
-- Errors: 42P01, 42703 where table or column are gone.
CREATE OR REPLACE FUNCTION tbl_repl._target_shape(target tbl_repl.target, conn text)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    facts jsonb;
    shape jsonb;
    gone  name;
BEGIN
    facts := tbl_repl._call(conn, format($remote$
        SELECT pg_catalog.set_config('search_path', 'pg_catalog', true);
        SELECT coalesce(json_object_agg(a.attname, json_build_object(
                   'name', a.attname, 'type', format_type(a.atttypid, a.atttypmod), 'base', b.typname,
                   'length', CASE WHEN b.typname IN ('varchar', 'bpchar') THEN nullif(greatest(a.atttypmod, t.typtypmod), -1) - 4 END,
                   'collation', (SELECT format('%%I.%%I', ln.nspname, l.collname) FROM pg_collation AS l JOIN pg_namespace AS ln ON ln.oid = l.collnamespace
                                 WHERE l.oid = a.attcollation),
                   'indexed', EXISTS (
                       SELECT FROM pg_index AS i
                       WHERE i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NULL
                         AND (SELECT array_agg(k.attname::text ORDER BY g) FROM generate_series(0, cardinality(%L::text[]) - 1) AS g
                              JOIN pg_attribute AS k ON k.attrelid = c.oid AND k.attnum = i.indkey[g]) = %L::text[]))), '{}')
        FROM pg_class AS c
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        JOIN pg_type AS t ON t.oid = a.atttypid
        JOIN pg_type AS b ON b.oid = CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END
        WHERE n.nspname = %L AND c.relname = %L$remote$, target.dst_keys, target.dst_keys, target.dst_schema, target.dst_name), clock_timestamp() + target.timeout);
    SELECT jsonb_agg(facts -> c.name::text ORDER BY c.n), min(c.name::text) FILTER (WHERE NOT facts ? c.name::text)
    INTO shape, gone
    FROM unnest(target.sent_columns) WITH ORDINALITY AS c (name, n);
    IF gone IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = CASE WHEN facts = '{}' THEN 'undefined_table' ELSE 'undefined_column' END,
            MESSAGE = CASE WHEN facts = '{}' THEN format('table %s does not exist on the target', tbl_repl._dst_table(target))
                           ELSE format('column %I of table %s does not exist on the target', gone, tbl_repl._dst_table(target)) END,
            HINT    = format('See tbl_repl.check() and tbl_repl.alter_target(%s).', target.target_id);
    END IF;
    RETURN shape;
END
$function$;
COMMENT ON FUNCTION tbl_repl._target_shape(tbl_repl.target, text) IS 'types of the sent columns on the target';

-- SQL expression, for the target: the text of what the column holds after value, a text, was assigned to
-- it.  Not quite a cast, which cuts off what is too long: that would be refused; and which fails for all rows where a name of
-- an object (regclass) is unknown there.
CREATE OR REPLACE FUNCTION tbl_repl._assigned(shape_column jsonb, value text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE
        WHEN base IN ('text', 'json', 'bit', 'varbit') OR base = 'varchar' AND length IS NULL THEN value
        WHEN base = 'varchar'
        THEN format('CASE WHEN pg_catalog.btrim(pg_catalog.substr(%1$s, %2$s + 1)) = '''' THEN pg_catalog.left(%1$s, %2$s) ELSE %1$s END', value, length)
        WHEN base = 'bpchar' THEN format('pg_catalog.rtrim(%s)', value)
        WHEN base ~ '^reg(class|collation|namespace|oper|operator|proc|procedure|role|type)$'
        THEN format('CASE WHEN %1$s ~ ''^[0-9]+$'' THEN (%1$s)::oid::%2$s::text ELSE coalesce(pg_catalog.to_%2$s(%1$s)::text, %1$s) END', value, base)
        ELSE format('(%s)::%s::text', value, shape_column ->> 'type') END
    FROM (SELECT shape_column ->> 'base' AS base, shape_column ->> 'length' AS length) AS c
$function$;
COMMENT ON FUNCTION tbl_repl._assigned(jsonb, text) IS 'SQL expression: the text form of a value in a column of the target';

CREATE OR REPLACE FUNCTION tbl_repl._key_list(columns integer, keys text[])
RETURNS jsonb
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT coalesce(jsonb_agg(CASE WHEN columns = 1 THEN jsonb_build_array(k) ELSE k::jsonb END ORDER BY n), '[]')
    FROM unnest(keys) WITH ORDINALITY AS u (k, n)
$function$;
COMMENT ON FUNCTION tbl_repl._key_list(integer, text[]) IS 'keys as an array of arrays of text forms';

CREATE OR REPLACE FUNCTION tbl_repl._has_listed_key(target tbl_repl.target)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT string_agg(format('d.%I %s (e.k ->> %s)::%s', p.name, p.equals, p.n - 1, p.type), ' AND ' ORDER BY p.n)
    FROM tbl_repl._dst_key_parts(target) AS p
$function$;
COMMENT ON FUNCTION tbl_repl._has_listed_key(tbl_repl.target) IS 'SQL condition: row d of the target has the key e.k, an array of text forms';

-- What follows FROM, on the target: its rows d with these keys, e.k being the key and e.n its place.
CREATE OR REPLACE FUNCTION tbl_repl._by_key_list(target tbl_repl.target, keys jsonb)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('pg_catalog.json_array_elements(%L) WITH ORDINALITY AS e (k, n) JOIN %s AS d ON %s', keys, tbl_repl._dst_table(target), tbl_repl._has_listed_key(target))
$function$;
COMMENT ON FUNCTION tbl_repl._by_key_list(tbl_repl.target, jsonb) IS 'FROM clause: rows of the target with these keys';

-- Whether both sides have the same text for the rows with these keys: then nothing more has to be sent.
-- That they have not may have harmless reasons.
CREATE OR REPLACE FUNCTION tbl_repl._is_same(
    target tbl_repl.target,
    conn   text,
    keys   text[]
)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    here text;
BEGIN
    EXECUTE format('SELECT md5(r.upserts) FROM tbl_repl.render_%s($1, false, true, ''values'') AS r', target.target_id) INTO here USING keys;
    RETURN here IS NOT DISTINCT FROM tbl_repl._call(conn, format(
        'SELECT pg_catalog.md5(pg_catalog.string_agg(pg_catalog.concat(''('', pg_catalog.array_to_string(ARRAY[%s], '', ''), '')''), '', '' ORDER BY e.n)) FROM %s',
        (SELECT string_agg(format('pg_catalog.quote_nullable(d.%I::text)', c), ', ' ORDER BY n) FROM unnest(target.sent_columns) WITH ORDINALITY AS u (c, n)),
        tbl_repl._by_key_list(target, tbl_repl._key_list(cardinality(target.dst_keys), keys))), clock_timestamp() + target.timeout);
EXCEPTION WHEN assert_failure OR OTHERS THEN
    IF tbl_repl._is_definition_error(SQLSTATE) OR tbl_repl._is_transient(SQLSTATE) THEN
        RAISE;
    END IF;
    RETURN false;  -- a key that the target's column cannot hold, or a row on which an expression fails
END
$function$;
COMMENT ON FUNCTION tbl_repl._is_same(tbl_repl.target, text, text[]) IS
    'whether a hash over the rows with these keys is the same on both sides';

-- _differences(target, conn, shape, keys): {key: 'missing_on_target' | 'different'}.  Keys without a row here
-- are left out.  A value that the target's column cannot hold is a difference too, and so is a row on which filter or map
-- fail: halving finds it.
CREATE OR REPLACE FUNCTION tbl_repl._differences(
    target tbl_repl.target,
    conn   text,
    shape  jsonb,
    keys   text[]
)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    row_values text;
    positions  integer[];
    answer     jsonb;
    half       integer := cardinality(keys) / 2;
    present    boolean := false;
BEGIN
    SELECT array_agg(array_position(target.sent_columns, k.name) ORDER BY k.n) INTO positions
    FROM unnest(target.dst_keys) WITH ORDINALITY AS k (name, n);
    BEGIN
        EXECUTE format('SELECT r.upserts FROM tbl_repl.render_%s($1, false, true, ''values'') AS r', target.target_id) INTO row_values USING keys;
        IF row_values IS NULL THEN
            RETURN '{}';
        END IF;
        -- IS NULL, of a key that is a composite, would look at its fields
        answer := tbl_repl._call(conn, (
            SELECT format('WITH v (%s) AS (VALUES %s) SELECT pg_catalog.json_agg(pg_catalog.json_build_array(d.%I IS NOT DISTINCT FROM NULL, pg_catalog.json_build_array(%s))) '
                          'FROM v LEFT JOIN %s AS d ON %s WHERE d.%I IS NOT DISTINCT FROM NULL OR %s',
                          (SELECT string_agg(format('c%s', n), ', ' ORDER BY n) FROM generate_subscripts(target.sent_columns, 1) AS n),
                          row_values, target.dst_keys[1],
                          (SELECT string_agg(format('v.c%s', p), ', ' ORDER BY n) FROM unnest(positions) WITH ORDINALITY AS u (p, n)),
                          tbl_repl._dst_table(target),
                          (SELECT string_agg(format('d.%I %s (v.c%s)::%s', p.name, p.equals, positions[p.n], p.type), ' AND ' ORDER BY p.n)
                           FROM tbl_repl._dst_key_parts(target) AS p),
                          target.dst_keys[1],
                          string_agg(format('(%s) COLLATE "C" IS DISTINCT FROM d.%I::text COLLATE "C"',
                                            tbl_repl._assigned(c, format('v.c%s', n)), c ->> 'name'), ' OR ' ORDER BY n))
            FROM jsonb_array_elements(shape) WITH ORDINALITY AS s (c, n)), clock_timestamp() + target.timeout);
    EXCEPTION WHEN assert_failure OR OTHERS THEN
        IF tbl_repl._is_definition_error(SQLSTATE) OR tbl_repl._is_transient(SQLSTATE) THEN
            RAISE;
        ELSIF half > 0 THEN
            RETURN tbl_repl._differences(target, conn, shape, keys[:half]) || tbl_repl._differences(target, conn, shape, keys[half + 1:]);
        END IF;
        BEGIN
            present := tbl_repl._call(conn, format('SELECT pg_catalog.count(*) FROM %s', tbl_repl._by_key_list(
                target, tbl_repl._key_list(cardinality(target.dst_keys), keys))), clock_timestamp() + target.timeout) <> '0';
        EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
            present := false;
        END;
        RETURN jsonb_build_object(keys[1], CASE WHEN present THEN 'different' ELSE 'missing_on_target' END);
    END;
    RETURN coalesce((
        SELECT jsonb_object_agg(CASE WHEN cardinality(positions) = 1 THEN a -> 1 ->> 0 ELSE (a -> 1)::text END,
                                CASE WHEN (a -> 0)::boolean THEN 'missing_on_target' ELSE 'different' END)
        FROM jsonb_array_elements(answer) AS a), '{}');
END
$function$;
COMMENT ON FUNCTION tbl_repl._differences(tbl_repl.target, text, jsonb, text[]) IS
    'which rows of the source the target has not, or not so';

CREATE OR REPLACE FUNCTION tbl_repl._not_pending(target tbl_repl.target, keys text[])
RETURNS text[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    remaining text[];
BEGIN
    IF cardinality(keys) = 0 THEN
        RETURN keys;
    END IF;
    -- a TRUNCATE of the whole table that is queued stands for every key
    EXECUTE format('WITH pending AS MATERIALIZED (SELECT c.keys FROM %s) '
                   'SELECT coalesce(array_agg(u.k ORDER BY u.n), ''{}'') FROM unnest($1) WITH ORDINALITY AS u (k, n) '
                   'WHERE NOT EXISTS (SELECT FROM pending AS p WHERE p.keys IS NULL) '
                   'AND u.k NOT IN (SELECT q FROM pending AS p, unnest(p.keys) AS q)',
                   tbl_repl._pending_from(target, tbl_repl._position(target.target_id)))
    INTO remaining USING keys;
    RETURN remaining;
END
$function$;
COMMENT ON FUNCTION tbl_repl._not_pending(tbl_repl.target, text[]) IS 'the keys for which nothing is queued';

-- SQL condition: row d of the target has a key after one and up to another, in the target's order; NULL: no bound.
-- IS NOT NULL, of a composite, would look at its fields.
CREATE OR REPLACE FUNCTION tbl_repl._target_range(target tbl_repl.target, after jsonb, upto jsonb)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT concat_ws(' AND ',
        CASE WHEN after IS NULL THEN (SELECT string_agg(format('%s IS DISTINCT FROM NULL', c), ' AND ' ORDER BY n) FROM unnest(k.columns) WITH ORDINALITY AS u (c, n))
             ELSE format('(%s)', tbl_repl._comes_after(k.columns, k.equals, k.greater, k.afters)) END,
        CASE WHEN upto IS NOT NULL THEN format('(%s)', tbl_repl._comes_until(k.columns, k.equals, k.greater, k.uptos)) END)
    FROM (SELECT array_agg(format('d.%I', p.name) ORDER BY p.n) AS columns,
                 array_agg(p.equals ORDER BY p.n) AS equals, array_agg(p.greater ORDER BY p.n) AS greater,
                 array_agg(format('%L::%s', after ->> (p.n - 1), p.type) ORDER BY p.n) AS afters,
                 array_agg(format('%L::%s', upto ->> (p.n - 1), p.type) ORDER BY p.n) AS uptos
          FROM tbl_repl._dst_key_parts(target) AS p) AS k
$function$;
COMMENT ON FUNCTION tbl_repl._target_range(tbl_repl.target, jsonb, jsonb) IS 'SQL condition: a row of the target is between two keys';

-- The target's keys in a range, in the order of its own index, as an array of arrays of text forms.
CREATE OR REPLACE FUNCTION tbl_repl._target_page_sql(
    target   tbl_repl.target,
    after    jsonb,
    upto     jsonb,
    max_rows integer
)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('SELECT pg_catalog.json_agg(x.k) FROM (SELECT pg_catalog.json_build_array(%s) AS k FROM %s AS d WHERE %s ORDER BY %s LIMIT %s) AS x',
                  string_agg(format('d.%I::text', p.name), ', ' ORDER BY p.n), tbl_repl._dst_table(target),
                  tbl_repl._target_range(target, after, upto),
                  string_agg(format('d.%I', p.name), ', ' ORDER BY p.n), max_rows)
    FROM tbl_repl._dst_key_parts(target) AS p
$function$;
COMMENT ON FUNCTION tbl_repl._target_page_sql(tbl_repl.target, jsonb, jsonb, integer) IS 'query that lists keys of the target';

-- Rows that no target of this node brings there, for a table may be fed by several: [{k: the key there,
-- s: the key here, or null}].
CREATE OR REPLACE FUNCTION tbl_repl._unknown_to_all(
    target tbl_repl.target,
    conn   text,
    shape  jsonb,
    keys   jsonb
)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    other   tbl_repl.target%ROWTYPE;
    unknown jsonb := tbl_repl._unknown(target, target.dst_keys, conn, shape, keys);
    theirs  jsonb;
BEGIN
    FOR other IN
        SELECT t.* FROM tbl_repl.target AS t
        WHERE t.server = target.server AND t.dst_schema = target.dst_schema AND t.dst_name = target.dst_name AND t.target_id <> target.target_id
    LOOP
        EXIT WHEN unknown = '[]';
        theirs := tbl_repl._unknown(other, target.dst_keys, conn, shape, jsonb_path_query_array(unknown, '$[*].k'));
        SELECT coalesce(jsonb_agg(u), '[]') INTO unknown
        FROM jsonb_array_elements(unknown) AS u
        WHERE u -> 'k' IN (SELECT t -> 'k' FROM jsonb_array_elements(theirs) AS t);
    END LOOP;
    RETURN unknown;
END
$function$;
COMMENT ON FUNCTION tbl_repl._unknown_to_all(tbl_repl.target, text, jsonb, jsonb) IS
    'which keys of the target no target of this node accounts for';

-- _keys_from_there(target, names, conn, shape, keys): keys that the target has (of the columns names), as those of the source, in
-- their order; NULL for one that none of the source becomes.
-- A key there becomes a key here by the reverse of what assigning does: through numeric between number types,
-- else by its text.  Where types differ it has to lead back to where it came from, or it is another key:
-- the text '007' is not what the number 7 becomes.
CREATE OR REPLACE FUNCTION tbl_repl._keys_from_there(
    target tbl_repl.target,
    names  name[],
    conn   text,
    shape  jsonb,
    keys   jsonb
)
RETURNS text[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO, MDY' SET intervalstyle = 'postgres' SET timezone = 'UTC'
SET extra_float_digits = 1 SET bytea_output = 'hex' SET lc_monetary = 'C' SET array_nulls = on
AS $function$
DECLARE
    source    tbl_repl.source%ROWTYPE;
    positions integer[];
    reverse   text;
    forward   text;
    same_type boolean;
    forms     text[];
    form      text;
    returned  jsonb;
    item      record;
BEGIN
    SELECT * INTO STRICT source FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
    SELECT array_agg(array_position(names, k.name) - 1 ORDER BY k.n) INTO positions
    FROM unnest(target.dst_keys) WITH ORDINALITY AS k (name, n);
    SELECT string_agg(format(CASE WHEN h.type <> t.type AND y.typcategory = 'N' AND c ->> 'category' = 'N'
                                  THEN '(k ->> %s)::numeric::%s::text' ELSE '(k ->> %s)::%s::text' END, positions[h.n], h.type), ', ' ORDER BY h.n),
           bool_and(h.type = t.type),
           string_agg(tbl_repl._assigned(f, format('(e.k ->> %s)', h.n - 1)), ', ' ORDER BY h.n)
    INTO reverse, same_type, forward
    FROM tbl_repl._key_parts(source.source_table, source.key_columns) AS h
    JOIN tbl_repl._dst_key_parts(target) AS t ON t.n = h.n
    JOIN pg_type AS y ON y.oid = h.type_id
    LEFT JOIN jsonb_array_elements(target.remote -> 'columns') AS c ON c ->> 'name' = t.name::text
    LEFT JOIN jsonb_array_elements(shape) AS f ON f ->> 'name' = t.name::text;
    IF cardinality(positions) > 1 THEN
        reverse := format('json_build_array(%s)::text', reverse);
    END IF;
    BEGIN
        EXECUTE format('SELECT array_agg(%s ORDER BY n) FROM jsonb_array_elements($1) WITH ORDINALITY AS e (k, n)', reverse) INTO forms USING keys;
    EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
        forms := '{}';
        FOR item IN SELECT k FROM jsonb_array_elements(keys) WITH ORDINALITY AS e (k, n) ORDER BY n LOOP
            BEGIN
                EXECUTE format('SELECT %s FROM (SELECT $1 AS k) AS e', reverse) INTO form USING item.k;
            EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
                form := NULL;
            END;
            forms := array_append(forms, form);
        END LOOP;
    END;
    IF NOT same_type AND array_remove(forms, NULL) <> '{}' THEN
        returned := tbl_repl._call(conn, format(
            'SELECT pg_catalog.json_agg(pg_catalog.json_build_array(%s) ORDER BY e.n) FROM pg_catalog.json_array_elements(%L) WITH ORDINALITY AS e (k, n)',
            forward, tbl_repl._key_list(cardinality(positions), array_remove(forms, NULL))), clock_timestamp() + target.timeout);
        -- the answers come in the order of the forms that are not null
        SELECT array_agg(CASE WHEN returned -> (f.m - 1)::integer = f.k THEN f.form END ORDER BY f.n) INTO forms
        FROM (SELECT u.form, u.n, count(u.form) OVER (ORDER BY u.n) AS m,
                     (SELECT jsonb_agg(keys -> (u.n - 1)::integer -> p ORDER BY o) FROM unnest(positions) WITH ORDINALITY AS q (p, o)) AS k
              FROM unnest(forms) WITH ORDINALITY AS u (form, n)) AS f;
    END IF;
    RETURN forms;
END
$function$;
COMMENT ON FUNCTION tbl_repl._keys_from_there(tbl_repl.target, name[], text, jsonb, jsonb) IS
    'keys of the target as keys of the source';

-- A row on which the filter fails is there.
CREATE OR REPLACE FUNCTION tbl_repl._without_row(target_id integer, keys text[])
RETURNS text[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    gone text[];
    half integer := cardinality(keys) / 2;
BEGIN
    EXECUTE format('SELECT ARRAY(SELECT json_array_elements_text(r.deletes::json)) FROM tbl_repl.render_%s($1, false, true, ''keys'') AS r', target_id)
    INTO gone USING keys;
    RETURN coalesce(gone, '{}');
EXCEPTION WHEN assert_failure OR OTHERS THEN
    IF tbl_repl._is_definition_error(SQLSTATE) OR tbl_repl._is_transient(SQLSTATE) THEN
        RAISE;
    ELSIF half = 0 THEN
        RETURN '{}';
    END IF;
    RETURN tbl_repl._without_row(target_id, keys[:half]) || tbl_repl._without_row(target_id, keys[half + 1:]);
END
$function$;
COMMENT ON FUNCTION tbl_repl._without_row(integer, text[]) IS 'the keys for which the source has nothing to send';

-- _unknown(target, names, conn, shape, keys): keys (of the columns names) that this target does not account for.
-- Where this cannot be found out (other key columns, another owner, a table that was dropped) the target accounts for all of them.
CREATE OR REPLACE FUNCTION tbl_repl._unknown(
    target tbl_repl.target,
    names  name[],
    conn   text,
    shape  jsonb,
    keys   jsonb
)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    source tbl_repl.source%ROWTYPE;
    forms  text[];
    gone   text[];
BEGIN
    IF keys = '[]' OR NOT (target.dst_keys @> names AND target.dst_keys <@ names)
       OR has_function_privilege(to_regprocedure((tbl_repl._target_functions(target.target_id))[1]), 'EXECUTE') IS NOT TRUE THEN
        RETURN '[]';
    END IF;
    SELECT * INTO STRICT source FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
    IF NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = source.source_table) THEN
        RETURN '[]';
    END IF;
    forms := tbl_repl._keys_from_there(target, names, conn, shape, keys);
    gone := tbl_repl._not_pending(target, tbl_repl._without_row(target.target_id, array_remove(forms, NULL)));
    RETURN coalesce((
        SELECT jsonb_agg(jsonb_build_object('k', keys -> (f.n - 1)::integer, 's', f.form) ORDER BY f.n)
        FROM unnest(forms) WITH ORDINALITY AS f (form, n)
        WHERE f.form IS NULL OR f.form = ANY (gone)), '[]');
END
$function$;
COMMENT ON FUNCTION tbl_repl._unknown(tbl_repl.target, name[], text, jsonb, jsonb) IS
    'which keys of the target a target of this node does not account for';
