-- Render: from keys to the SQL for one target.
--
-- For each target five thin functions are generated, owned by the target's owner and SECURITY DEFINER,
-- because its filter, its map and its connection are his: render_N reads the state of some keys and says
-- it in SQL, row_N the same for a single one, page_N lists keys, connect_N opens the connection, digest_N is for
-- comparing.  Shipping, explain_target and sync_err_rec all go through render_N, so that what is shown is what is
-- sent.

CREATE OR REPLACE FUNCTION tbl_repl._dst_table(target tbl_repl.target)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('%I.%I', target.dst_schema, target.dst_name)
$function$;
COMMENT ON FUNCTION tbl_repl._dst_table(tbl_repl.target) IS 'the target''s table, quoted';

-- INSERT INTO ... VALUES and ON CONFLICT ..., between which the rows go.  Key columns stand in the SET
-- list too: 1.0 and 1.00 are equal keys.  Rows that are equal already are left alone; compared directly
-- where equal means the same, else by text (json has no =, 1.0 = 1.00).
CREATE OR REPLACE FUNCTION tbl_repl._upsert_parts(
    target tbl_repl.target,
    OUT head text,
    OUT tail text
)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    WITH c AS (
        SELECT u.name, u.n, r.c ->> 'identity' = 'a' AS always,
               CASE WHEN r.c ->> 'base' = ANY ('{int2,int4,int8,text,bool,uuid,date,timestamp,timestamptz,bytea,oid}'::text[])
                         AND NOT coalesce((r.c ->> 'fuzzy')::boolean, false)
                    THEN '' ELSE '::text COLLATE "C"' END AS compared
        FROM unnest(target.sent_columns) WITH ORDINALITY AS u (name, n)
        LEFT JOIN LATERAL (SELECT e AS c FROM jsonb_array_elements(target.remote -> 'columns') AS e
                           WHERE e ->> 'name' = u.name::text) AS r ON true
    )
    SELECT format('INSERT INTO %s AS d (%s)%s VALUES ', tbl_repl._dst_table(target),
                  string_agg(format('%I', name), ', ' ORDER BY n),
                  CASE WHEN bool_or(always) THEN ' OVERRIDING SYSTEM VALUE' ELSE '' END),
           format(' ON CONFLICT (%s) ', (SELECT string_agg(format('%I', k), ', ' ORDER BY n)
                                         FROM unnest(target.dst_keys) WITH ORDINALITY AS k (k, n)))
           || CASE WHEN bool_and(coalesce(always, false)) THEN 'DO NOTHING'
                   ELSE format('DO UPDATE SET %s WHERE ROW(%s) IS DISTINCT FROM ROW(%s)',
                               string_agg(format('%1$I = excluded.%1$I', name), ', ' ORDER BY n) FILTER (WHERE always IS NOT TRUE),
                               string_agg(format('d.%I%s', name, compared), ', ' ORDER BY n) FILTER (WHERE always IS NOT TRUE),
                               string_agg(format('excluded.%I%s', name, compared), ', ' ORDER BY n) FILTER (WHERE always IS NOT TRUE))
              END
    FROM c
$function$;
COMMENT ON FUNCTION tbl_repl._upsert_parts(tbl_repl.target) IS
    'what stands before and after the rows of an upsert';

-- What the remote side needs to find rows by key: type and operator of each of its key columns.
CREATE OR REPLACE FUNCTION tbl_repl._dst_key_parts(target tbl_repl.target)
RETURNS TABLE (n integer, name name, type text, equals text, greater text, by_text boolean)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT k.n::integer, k.name, c ->> 'type', coalesce(c ->> 'equals', 'OPERATOR(pg_catalog.=)'), coalesce(c ->> 'greater', 'OPERATOR(pg_catalog.>)'),
           coalesce(c ->> 'category' IN ('A', 'C') OR c ->> 'type' ~ '^reg', false)
    FROM unnest(target.dst_keys) WITH ORDINALITY AS k (name, n)
    LEFT JOIN LATERAL (SELECT c FROM jsonb_array_elements(target.remote -> 'columns') AS c
                       WHERE c ->> 'name' = k.name::text) AS c ON true
    ORDER BY k.n
$function$;
COMMENT ON FUNCTION tbl_repl._dst_key_parts(tbl_repl.target) IS
    'type and operators of the key columns on the target, in order';

-- An SQL expression (run here, over the array variable called by keys_name) that gives the condition
-- for rows d of the target with one of these keys, and the clause it needs in FROM or USING.
-- Keys that are arrays or composites travel as text: unnest would take them apart; so do names of objects (regclass),
-- which have the operators of oid, and would be taken for one.
CREATE OR REPLACE FUNCTION tbl_repl._by_keys(
    target    tbl_repl.target,
    keys_name text,
    OUT from_expression  text,
    OUT where_expression text
)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN count(*) = 1 AND NOT bool_or(p.by_text) THEN ''''''
                ELSE format('format(%L, %s)',
                            format(' %%s unnest(%s) AS k (%s)',
                                   string_agg(CASE WHEN p.by_text THEN '%L::text[]' ELSE format('%%L::%s[]', replace(p.type, '%', '%%')) END, ', ' ORDER BY p.n),
                                   string_agg(format('k%s', p.n), ', ' ORDER BY p.n)),
                            '{clause}, ' || CASE WHEN count(*) = 1 THEN keys_name
                                ELSE string_agg(format('(SELECT array_agg(x::json ->> %s ORDER BY o) FROM unnest(%s) WITH ORDINALITY AS x (x, o))', p.n - 1, keys_name), ', ' ORDER BY p.n) END) END,
           CASE WHEN count(*) = 1 AND NOT bool_or(p.by_text)
                THEN format('format(%L, %s)', format('d.%s %s ANY (%%L)', replace(quote_ident(min(p.name::text)), '%', '%%'), replace(min(p.equals), '%', '%%')), keys_name)
                ELSE quote_literal(string_agg(format('d.%I %s k.k%s%s', p.name, p.equals, p.n,
                                                     CASE WHEN p.by_text THEN '::' || p.type END), ' AND ' ORDER BY p.n)) END
    FROM tbl_repl._dst_key_parts(target) AS p
$function$;
COMMENT ON FUNCTION tbl_repl._by_keys(tbl_repl.target, text) IS
    'SQL expressions that render a condition on the keys in an array';

-- Where a secondary unique value wanders from one row of a batch to another, it has to be given up
-- first.  Deleting and inserting again does that, but would take children along by CASCADE, SET NULL
-- or SET DEFAULT, and is refused by NO ACTION, and forgets what only the target has in columns of its own; so in such
-- tables the value is replaced by one that nobody has.  Not in columns that are not sent, for nothing would bring it back,
-- nor in those whose changes a foreign key follows, which would carry it on.
CREATE OR REPLACE FUNCTION tbl_repl._aside_assignments(target tbl_repl.target)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    WITH chosen AS (
        SELECT DISTINCT ON (i.i) c.c
        FROM jsonb_array_elements(target.remote -> 'unique') WITH ORDINALITY AS i (i, n)
        CROSS JOIN LATERAL jsonb_array_elements_text(i.i) AS u (name)
        JOIN LATERAL (SELECT c FROM jsonb_array_elements(target.remote -> 'columns') AS c WHERE c ->> 'name' = u.name) AS c ON true
        WHERE u.name::name <> ALL (target.dst_keys) AND u.name::name = ANY (target.sent_columns)
          AND NOT target.remote -> 'followed' ? u.name AND c.c ->> 'identity' <> 'a'
        ORDER BY i.i, (c.c ->> 'notnull')::boolean, c.c ->> 'name'
    ), assigned AS (
        SELECT DISTINCT c ->> 'name' AS name,
               CASE WHEN NOT (c ->> 'notnull')::boolean THEN 'NULL'
                    WHEN c ->> 'base' IN ('text', 'varchar', 'bpchar', 'citext', 'name')
                    THEN format('pg_catalog.left(pg_catalog.md5(pg_catalog.random()::text || d.ctid::text), %s)', coalesce(c ->> 'length', '32'))
                    WHEN c ->> 'base' = 'uuid' THEN 'pg_catalog.gen_random_uuid()'
                    WHEN c ->> 'base' = 'int2' THEN '(-32768 + pg_catalog.floor(pg_catalog.random() * 32000))::int2'
                    WHEN c ->> 'base' = 'int4' THEN '(-2147483648 + pg_catalog.floor(pg_catalog.random() * 2147483000))::int4'
                    WHEN c ->> 'base' = 'int8' THEN '(-9000000000000000000 + pg_catalog.floor(pg_catalog.random() * 1000000000000000000))::int8'
                    WHEN c ->> 'base' IN ('float4', 'float8') THEN '-pg_catalog.random() * 1e30'
                    WHEN c ->> 'base' = 'bytea' THEN 'pg_catalog.decode(pg_catalog.md5(pg_catalog.random()::text || d.ctid::text), ''hex'')'
                    WHEN c ->> 'category' = 'R' AND c ->> 'base' !~ 'multirange' THEN '''empty'''
                    WHEN c ->> 'base' IN ('date', 'timestamp', 'timestamptz')
                    THEN format('(''4000-01-01 BC''::timestamp + pg_catalog.random() * interval ''3000 years'')::%s', c ->> 'base')
               END AS value
        FROM chosen
    )
    SELECT string_agg(format('%I = %s', name, value), ', ' ORDER BY name) FROM assigned WHERE value IS NOT NULL
$function$;
COMMENT ON FUNCTION tbl_repl._aside_assignments(tbl_repl.target) IS
    'SET list that takes secondary unique values out of the way; NULL where there are none';

-- _render_sql(target_id): CREATE FUNCTION render_N(keys, mine, absent, form) -> (deletes, upserts, rows).
--   mine:   REPEATABLE READ writers: only what this transaction has written is its state; an older
--           version that its snapshot still shows was deleted by somebody else.
--   absent: whether a key without a row means a deletion (not for targets without the operation delete).
--   form:   'prepared' (one row: EXECUTE), 'plain' (what a user may read), 'aside' (values that wander
--           between rows are given up: deletes says how, before anything else is done), 'free' (deletes leaves alone what rows
--           refer to, which may have another parent soon); for comparing: 'values' (upserts: the rows alone, deletes: the
--           keys without a row, as JSON) or 'keys' (as 'values', without values).
--   rows:   number of keys rendered; deletes and upserts are NULL where there is nothing to say.
-- STABLE: every table of a batch is read in the snapshot of the statement that calls.
-- A plan that was made while the table was small must not become a sequential scan per commit; jit: see _flush, of tables that
-- filter and map read.
CREATE OR REPLACE FUNCTION tbl_repl._render_sql(target_id integer)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target   tbl_repl.target%ROWTYPE;
    source   tbl_repl.source%ROWTYPE;
    types    oid[];
    parts    record;
    by_keys  record;
    aside    text;
    always   name[];
    mismatch text := '';
    body     text;
BEGIN
    SELECT * INTO STRICT target FROM tbl_repl.target AS t WHERE t.target_id = _render_sql.target_id;
    SELECT * INTO STRICT source FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
    types := tbl_repl._sent_types(target, source.source_table);
    parts := tbl_repl._upsert_parts(target);
    by_keys := tbl_repl._by_keys(target, 'gone');
    aside := tbl_repl._aside_assignments(target);
    always := tbl_repl._always_columns(target);
    IF cardinality(always) > 0 THEN
        mismatch := format($piece$
    IF rendered IS NOT NULL THEN
        SELECT concat_ws('; ', string_agg(format(%L,
               (SELECT string_agg(format('d.%%I %%s %%L', c, e, v), ' AND ') FROM unnest(%L::name[], %L::text[], key_values) AS x (c, e, v)),
               (SELECT string_agg(format('d.%%I IS DISTINCT FROM %%L', c, v), ' OR ') FROM unnest(%L::name[], fixed_values) AS x (c, v))), '; '), upserts)
        INTO upserts
        FROM (SELECT ARRAY[%s] AS key_values, ARRAY[%s] AS fixed_values
              FROM unnest(tbl_repl_keys) AS u (tbl_repl_key), %s AS s WHERE %s) AS fixed;
    END IF;$piece$, tbl_repl._renewal_sql(target), target.dst_keys,
            (SELECT array_agg(k.equals ORDER BY k.n) FROM tbl_repl._dst_key_parts(target) AS k), always,
            (SELECT string_agg(format('s.%I::text', k), ', ' ORDER BY n) FROM unnest(source.key_columns) WITH ORDINALITY AS k (k, n)),
            (SELECT string_agg(format('(%s)::text', target.sent_exprs[array_position(target.sent_columns, a)]), ', ' ORDER BY n)
             FROM unnest(always) WITH ORDINALITY AS a (a, n)),
            source.source_table, tbl_repl._key_match(source.source_table, source.key_columns));
    END IF;

    body := format($body$
#variable_conflict use_column
DECLARE
    rendered text;
    present  integer;
    gone     text[];
BEGIN
    SELECT string_agg(%13$sv.row_text, ', '), count(%13$sv.row_text)::integer,
           array_agg(u.tbl_repl_key) FILTER (WHERE v.row_text IS NULL AND (tbl_repl_absent OR v.found)),
           cardinality(tbl_repl_keys)
    INTO rendered, present, gone, rows
    FROM unnest(tbl_repl_keys) AS u (tbl_repl_key)
    LEFT JOIN LATERAL (
        SELECT true AS found, %1$s AS row_text
        FROM %2$s AS s
        WHERE %3$s
          AND (NOT tbl_repl_mine OR tbl_repl._is_mine(s.xmin))
    ) AS v ON true;
    IF tbl_repl_form IN ('values', 'keys') THEN
        deletes := array_to_json(gone)::text;
        upserts := rendered;
        RETURN;
    END IF;
    IF gone IS NOT NULL THEN
        deletes := CASE WHEN tbl_repl_form = 'prepared' AND cardinality(gone) = 1
                        THEN %4$s
                        ELSE %5$L || %6$s || ' WHERE ' || %7$s END;
    END IF;
    IF tbl_repl_form = 'free' THEN
        deletes := deletes || %15$L;
    END IF;
    IF present = 1 AND tbl_repl_form = 'prepared' THEN
        upserts := format(%8$L, substr(rendered, 2));
    ELSIF present > 0 THEN
        upserts := %9$L || rendered || %10$L;
    END IF;
%14$s%12$s
    IF tbl_repl_form = 'aside' THEN
        gone := tbl_repl_keys;
        %11$s
        RETURN;
    END IF;
END
$body$,
            concat('CASE WHEN ' || target.filter_expr || ' THEN ',
                   format('CASE WHEN tbl_repl_form = ''keys'' THEN '''' ELSE ''('' || array_to_string(ARRAY[%s], '', '') || '')'' END',
                          (SELECT string_agg(format('quote_nullable((%s)::text)', e), ', ' ORDER BY n)
                           FROM unnest(target.sent_exprs) WITH ORDINALITY AS e (e, n))),
                   CASE WHEN target.filter_expr IS NOT NULL THEN ' END' END),
            source.source_table,
            tbl_repl._row_match(target, source),
            tbl_repl._execute_delete(target, 'gone[1]', '''infinity'''),
            format('DELETE FROM %s AS d', tbl_repl._dst_table(target)),
            replace(by_keys.from_expression, '{clause}', '''USING'''),
            by_keys.where_expression,
            format('EXECUTE tbl_repl_u%s_%s (''infinity'', %%s', target_id, target.generation),
            parts.head, parts.tail,
            CASE WHEN (target.remote ->> 'referenced')::boolean OR tbl_repl._has_own_columns(target)
                 THEN CASE WHEN aside IS NULL THEN 'deletes := NULL;'
                           ELSE format('deletes := %L || %s || '' WHERE '' || %s;',
                                       format('UPDATE %s AS d SET %s', tbl_repl._dst_table(target), aside),
                                       replace(by_keys.from_expression, '{clause}', '''FROM'''), by_keys.where_expression) END
                 -- were it referenced by now, deleting would take children along
                 ELSE format('deletes := %L || %s || '' WHERE '' || %s || %L;', format('DELETE FROM %s AS d', tbl_repl._dst_table(target)),
                             replace(by_keys.from_expression, '{clause}', '''USING'''), by_keys.where_expression,
                             format(' AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint AS f WHERE f.contype = ''f'' AND f.confrelid = %L::pg_catalog.regclass)',
                                    tbl_repl._dst_table(target))) END,
            mismatch,
            CASE WHEN NOT tbl_repl._has_exact_key(source.source_table, source.key_columns) THEN 'DISTINCT ' END,
            tbl_repl._render_values_sql(target, source),
            target.remote ->> 'unreferred');
    body := tbl_repl._with_source_checked(source, body);
    RETURN format($sql$CREATE OR REPLACE FUNCTION tbl_repl.%I(
    tbl_repl_keys   text[],
    tbl_repl_mine   boolean,
    tbl_repl_absent boolean,
    tbl_repl_form   text,
    OUT deletes     text,
    OUT upserts     text,
    OUT rows        integer
)
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp%s%s
SET enable_seqscan = off
SET plan_cache_mode = force_generic_plan
SET jit = off
AS %L$sql$,
        format('render_%s', target_id), E'\n' || nullif(tbl_repl._text_settings(tbl_repl._with_filter(types, target)), ''),
        tbl_repl._literal_setting(body), body);
END
$function$;
COMMENT ON FUNCTION tbl_repl._render_sql(integer) IS
    'text of render_N, which says the state of some keys in SQL for one target';

-- What an identity column that is always generated has there can only be had by inserting the row anew; not where that would
-- take along what refers to it, or forget what only the target has in it.  For format(), with the conditions of the key and of
-- another value.  Without rows in its result, as everything that is sent; the cast is about the row, or it would be evaluated
-- where there is none.
CREATE OR REPLACE FUNCTION tbl_repl._renewal_sql(target tbl_repl.target)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('DELETE FROM %s AS d WHERE %%1$s AND ', replace(tbl_repl._dst_table(target), '%', '%%'))
           || CASE WHEN target.cascades OR tbl_repl._has_own_columns(target)
                   THEN format('CASE WHEN %%1$s AND (%%2$s) THEN pg_catalog.concat(''tbl_repl: a column that is GENERATED ALWAYS has another value, and %s'', '
                               'pg_catalog.left(d.ctid::text, 0))::integer = 0 END',
                               CASE WHEN target.cascades THEN 'rows refer to this one' ELSE 'the row has columns that are not sent' END)
                   ELSE '(%2$s)' END
$function$;
COMMENT ON FUNCTION tbl_repl._renewal_sql(tbl_repl.target) IS
    'format of the statement that makes room for a row whose identity column has another value; it fails where that is not possible';

CREATE OR REPLACE FUNCTION tbl_repl._has_own_columns(target tbl_repl.target)
RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT EXISTS (SELECT FROM jsonb_array_elements(target.remote -> 'columns') AS c
                   WHERE NOT (c ->> 'generated')::boolean AND c ->> 'name' <> ALL (target.sent_columns::text[]))
$function$;
COMMENT ON FUNCTION tbl_repl._has_own_columns(tbl_repl.target) IS 'whether the target''s table has columns that are not sent';

-- For policies that the target settles: the statements of render_N that say the values of the keys, for _settle; what is gone
-- and what is there apart, for foreign keys ask for an order.
CREATE OR REPLACE FUNCTION tbl_repl._render_values_sql(target tbl_repl.target, source tbl_repl.source)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format($piece$
    SELECT json_agg(i.item) FILTER (WHERE i.gone)::text, json_agg(i.item) FILTER (WHERE NOT i.gone)::text
    INTO deletes, upserts
    FROM (
        SELECT json_build_object('k', %1$s, 'r', v.row_values, 't', v.row_text, 'v', %2$s, %3$s) AS item, v.row_values IS NULL AS gone
        FROM unnest(tbl_repl_keys) AS u (tbl_repl_key)
        LEFT JOIN LATERAL (
            SELECT array_to_json(ARRAY[%4$s]) AS row_values, %5$s AS row_text, %6$s AS version
            FROM %7$s AS s
            WHERE %8$s AND (NOT tbl_repl_mine OR tbl_repl._is_mine(s.xmin))%9$s
        ) AS v ON true
        %10$s
        WHERE tbl_repl_absent OR v.row_values IS NOT NULL
    ) AS i;
    deletes := CASE WHEN deletes IS NOT NULL AND tbl_repl_form NOT IN ('aside', 'free') THEN format(%11$L, deletes, '') END;
    upserts := CASE WHEN upserts IS NOT NULL THEN format(%11$L, upserts, CASE WHEN tbl_repl_form = 'aside' THEN ', true' END) END;
    RETURN;$piece$,
        CASE WHEN cardinality(source.key_columns) = 1 THEN 'json_build_array(u.tbl_repl_key)' ELSE 'u.tbl_repl_key::json' END,
        CASE WHEN target.on_conflict = 'newest' THEN 'CASE WHEN v.row_values IS NULL THEN x.version ELSE v.version END' ELSE 'v.version' END,
        CASE WHEN target.on_conflict = 'newest'
             THEN format('''f'', CASE WHEN v.row_values IS NULL AND x.version IS NULL THEN tbl_repl._is_wanted_gone(%s, u.tbl_repl_key) END', target.target_id)
             ELSE '''e'', x.digests' END,
        (SELECT string_agg(format('(%s)::text', e), ', ' ORDER BY n) FROM unnest(target.sent_exprs) WITH ORDINALITY AS e (e, n)),
        tbl_repl._row_text_sql(target),
        CASE WHEN target.version_column IS NULL THEN 'NULL::text' ELSE format('s.%I::text', target.version_column) END,
        source.source_table,
        tbl_repl._row_match(target, source),
        ' AND (' || target.filter_expr || ')',
        CASE WHEN target.on_conflict = 'newest'
             THEN format('LEFT JOIN tbl_repl.tombstone AS x ON x.local_table = (SELECT o.source_table FROM tbl_repl.source AS o WHERE o.source_id = %s) AND x.key = u.tbl_repl_key', source.source_id)
             ELSE format('LEFT JOIN tbl_repl._expected(%s, tbl_repl_keys) AS x ON x.key = u.tbl_repl_key', target.target_id) END,
        format('SELECT tbl_repl._settle(%s, %L, %s, %s, %s, %%L%%s)',
               replace(quote_literal(tbl_repl._dst_table(target)), '%', '%%'), target.on_conflict,
               replace(quote_literal(target.sent_columns::text), '%', '%%'), replace(quote_literal(target.dst_keys::text), '%', '%%'),
               replace(quote_nullable(target.version_column::text), '%', '%%')))
    WHERE target.on_conflict <> 'overwrite'
$function$;
COMMENT ON FUNCTION tbl_repl._render_values_sql(tbl_repl.target, tbl_repl.source) IS
    'statements that say the values of some keys to a target that settles conflicts';

-- A row version is ours while its transaction is in progress: nobody else's would be visible.
CREATE OR REPLACE FUNCTION tbl_repl._is_mine(version xid)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT age(version) <= 0
       AND pg_xact_status((pg_current_xact_id()::text::bigint - age(version))::text::xid8) = 'in progress'
$function$;
COMMENT ON FUNCTION tbl_repl._is_mine(xid) IS
    'whether a row version was written by this transaction or one of its subtransactions';

-- A row that a policy hides, or that is not in another table of the same name, would be taken for one that is gone.  Asked for
-- each time, for the policy, or the name, may come later; not by row_security = off, which would bind whatever tables filter and
-- map read as well.
CREATE OR REPLACE FUNCTION tbl_repl._with_source_checked(source tbl_repl.source, body text)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT overlay(body PLACING format(E'\nBEGIN\n    IF row_security_active(%1$L::text) THEN\n        PERFORM tbl_repl._refuse_hidden_rows(%1$L);\n    END IF;\n'
                                       '    IF (SELECT x.source_table FROM tbl_repl.source AS x WHERE x.source_id = %2$s) <> %1$L::regclass THEN\n'
                                       '        PERFORM tbl_repl._refuse_other_table(%2$s, %1$L);\n    END IF;\n',
                                       source.source_table, source.source_id)
                   FROM strpos(body, E'\nBEGIN\n') FOR length(E'\nBEGIN\n'))
$function$;
COMMENT ON FUNCTION tbl_repl._with_source_checked(tbl_repl.source, text) IS
    'body of a generated function that reads a source table, so that it fails when row-level security hides rows, or another table has its name';

CREATE OR REPLACE FUNCTION tbl_repl._refuse_other_table(source_id integer, name_there text)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = 'undefined_table',
        MESSAGE = format('%s is another table than the one that is replicated', name_there),
        DETAIL  = (SELECT format('That one is %s now.', s.source_table) FROM tbl_repl.source AS s WHERE s.source_id = _refuse_other_table.source_id),
        HINT    = 'tbl_repl.alter_target(...) goes on with that one. For the table that has its name: drop_target, then add_target.';
END
$function$;
COMMENT ON FUNCTION tbl_repl._refuse_other_table(integer, text) IS
    'fails where another table has the name that the replicated one had (42P01)';

CREATE OR REPLACE FUNCTION tbl_repl._refuse_hidden_rows(source_table text)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = 'insufficient_privilege',
        MESSAGE = format('row-level security hides rows of table %s from role %I', source_table, current_user),
        DETAIL  = 'One that is hidden could not be told from one that was deleted.',
        HINT    = format('ALTER TABLE %s NO FORCE ROW LEVEL SECURITY; or let a role with BYPASSRLS define the target.', source_table);
END
$function$;
COMMENT ON FUNCTION tbl_repl._refuse_hidden_rows(text) IS 'fails where row-level security hides rows of a source table (42501)';

-- page_N(after, count): the next keys in key order that pass the target's filter; NULL: from the start.
CREATE OR REPLACE FUNCTION tbl_repl._page_sql(target_id integer)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format($sql$CREATE OR REPLACE FUNCTION tbl_repl.%I(tbl_repl_after text, tbl_repl_count integer)
RETURNS text[]
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp%s%s
AS %L$sql$,
        format('page_%s', t.target_id),
        E'\n' || nullif((SELECT tbl_repl._text_settings(tbl_repl._with_filter(array_agg(p.type_id), t)) FROM tbl_repl._key_parts(s.source_table, s.key_columns) AS p), ''),
        tbl_repl._literal_setting(b.body), b.body)
    FROM tbl_repl.target AS t JOIN tbl_repl.source AS s USING (source_id)
    CROSS JOIN LATERAL (SELECT tbl_repl._with_source_checked(s, format($body$
#variable_conflict use_column
BEGIN
    BEGIN
        IF tbl_repl_after IS NULL THEN
            RETURN (SELECT array_agg(x.tbl_repl_key) FROM (
                SELECT %1$s AS tbl_repl_key FROM %2$s AS s WHERE %3$s ORDER BY %4$s LIMIT $2) AS x);
        END IF;
        RETURN (SELECT array_agg(x.tbl_repl_key) FROM (
            SELECT %1$s AS tbl_repl_key FROM %2$s AS s WHERE %3$s AND (%5$s) ORDER BY %4$s LIMIT $2) AS x);
    EXCEPTION WHEN lock_not_available THEN
        RAISE;
    WHEN assert_failure OR OTHERS THEN
        -- The filter fails on a row; on which is found out where the keys are shipped.
        IF tbl_repl_after IS NULL THEN
            RETURN (SELECT array_agg(x.tbl_repl_key) FROM (
                SELECT %1$s AS tbl_repl_key FROM %2$s AS s ORDER BY %4$s LIMIT $2) AS x);
        END IF;
        RETURN (SELECT array_agg(x.tbl_repl_key) FROM (
            SELECT %1$s AS tbl_repl_key FROM %2$s AS s WHERE %5$s ORDER BY %4$s LIMIT $2) AS x);
    END;
END
$body$, tbl_repl._key_text(s.key_columns, 's'), s.source_table, coalesce('(' || t.filter_expr || ')', 'true'),
            (SELECT string_agg(format('s.%I', p.name), ', ' ORDER BY p.n) FROM tbl_repl._key_parts(s.source_table, s.key_columns) AS p),
            tbl_repl._key_after(s.source_table, s.key_columns))) AS body) AS b
    WHERE t.target_id = _page_sql.target_id
$function$;
COMMENT ON FUNCTION tbl_repl._page_sql(integer) IS
    'text of page_N, which lists the keys of a target in key order';

CREATE OR REPLACE FUNCTION tbl_repl._connect_sql(target_id integer)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format($sql$CREATE OR REPLACE FUNCTION tbl_repl.%I(conn text, deadline timestamptz, sent_until timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS %L$sql$, format('connect_%s', t.target_id), format($body$
BEGIN
    PERFORM tbl_repl._open(conn, %L, %L, deadline, sent_until);
END
$body$, t.server, format('%s seconds', extract(epoch FROM t.timeout))))
    FROM tbl_repl.target AS t
    WHERE t.target_id = _connect_sql.target_id
$function$;
COMMENT ON FUNCTION tbl_repl._connect_sql(integer) IS
    'text of connect_N, which connects to a target as its owner';

-- An SQL expression (run here) that renders the deletion of one key by its prepared statement.
CREATE OR REPLACE FUNCTION tbl_repl._execute_delete(target tbl_repl.target, key_name text, deadline_name text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('format(%L, %s, %s)',
                  format('EXECUTE tbl_repl_d%s_%s (%s)', target.target_id, target.generation,
                         array_to_string(array_fill('%L'::text, ARRAY[cardinality(target.dst_keys) + 1]), ', ')),
                  deadline_name,
                  CASE WHEN cardinality(target.dst_keys) = 1 THEN key_name
                       ELSE (SELECT string_agg(format('%s::json ->> %s', key_name, n - 1), ', ' ORDER BY n)
                             FROM generate_series(1, cardinality(target.dst_keys)) AS n) END)
$function$;
COMMENT ON FUNCTION tbl_repl._execute_delete(tbl_repl.target, text, text) IS
    'SQL expression that renders the deletion of one key';

-- _row_sql(target_id): CREATE FUNCTION row_N(key, deadline) -> the message that brings one row of the target up to
-- date until the deadline, in seconds of our clock.  What render_N does for lists, for the usual case: one
-- key, nothing planned, nothing aggregated.
CREATE OR REPLACE FUNCTION tbl_repl._row_sql(target_id integer)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format($sql$CREATE OR REPLACE FUNCTION tbl_repl.%1$I(tbl_repl_key text, tbl_repl_deadline numeric)
RETURNS text
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp%2$s%3$s
SET enable_seqscan = off
SET plan_cache_mode = force_generic_plan
AS %4$L$sql$,
        format('row_%s', t.target_id),
        E'\n' || nullif(tbl_repl._text_settings(tbl_repl._with_filter(tbl_repl._sent_types(t, s.source_table), t)), ''),
        tbl_repl._literal_setting(b.body), b.body)
    FROM tbl_repl.target AS t JOIN tbl_repl.source AS s USING (source_id)
    CROSS JOIN LATERAL (SELECT tbl_repl._with_source_checked(s, format($body$
#variable_conflict use_column
DECLARE
    rendered text;
BEGIN
    SELECT %1$s INTO rendered FROM %2$s AS s WHERE %3$s;
    IF rendered IS NULL THEN
        RETURN %4$s;
    END IF;
    RETURN format(%5$L, tbl_repl_deadline, rendered);
END
$body$, format(CASE WHEN t.filter_expr IS NULL THEN '%s' ELSE 'CASE WHEN %2$s THEN %1$s END' END,
               format('array_to_string(ARRAY[%s], '', '')',
                      (SELECT string_agg(format('quote_nullable((%s)::text)', e), ', ' ORDER BY n)
                       FROM unnest(t.sent_exprs) WITH ORDINALITY AS e (e, n))), t.filter_expr),
            s.source_table,
            replace(tbl_repl._row_match(t, s), 'u.tbl_repl_key', format('row_%s.tbl_repl_key', t.target_id)),
            tbl_repl._execute_delete(t, 'tbl_repl_key', 'tbl_repl_deadline'),
            format('EXECUTE tbl_repl_u%s_%s (%%s, %%s)', t.target_id, t.generation))) AS body) AS b
    WHERE t.target_id = _row_sql.target_id
$function$;
COMMENT ON FUNCTION tbl_repl._row_sql(integer) IS
    'text of row_N, which says the state of one key in SQL for one target';

-- The target of a table whose single rows ship quickly: its only direct one, without anything that needs more
-- than one prepared statement a row.
CREATE OR REPLACE FUNCTION tbl_repl._quick_target(source_id integer)
RETURNS integer
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT min(t.target_id)
    FROM tbl_repl.target AS t
    WHERE t.source_id = _quick_target.source_id AND t.mode <> 'async'
    HAVING count(*) = 1 AND bool_and(t.operations @> '{insert,update,delete,truncate}' AND t.on_conflict = 'overwrite')
       AND NOT bool_or(EXISTS (SELECT FROM jsonb_array_elements(t.remote -> 'columns') AS c
                               WHERE c ->> 'identity' = 'a' AND c ->> 'name' = ANY (t.sent_columns::text[])))
$function$;
COMMENT ON FUNCTION tbl_repl._quick_target(integer) IS
    'the target of a table to which single rows are shipped without detours, if there is one';

-- The prepared statements of single rows.  $1: the deadline, looked at when everything is done, so that a message
-- that waited for a lock, or on its way, undoes itself; they always return one row.
CREATE OR REPLACE FUNCTION tbl_repl._prepare_sql(target tbl_repl.target)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('PREPARE tbl_repl_u%1$s_%2$s (float8) AS WITH d AS (%3$s(%4$s)%5$s RETURNING 1) %8$s; '
                  'PREPARE tbl_repl_d%1$s_%2$s (float8) AS WITH d AS (DELETE FROM %6$s AS d WHERE %7$s RETURNING 1) %8$s',
                  target.target_id, target.generation, p.head,
                  (SELECT string_agg(format('$%s', n + 1), ', ' ORDER BY n) FROM generate_series(1, cardinality(target.sent_columns)) AS n),
                  p.tail, tbl_repl._dst_table(target),
                  (SELECT string_agg(format('d.%I %s $%s%s', k.name, k.equals, k.n + 1, CASE WHEN k.by_text THEN '::' || k.type END), ' AND ' ORDER BY k.n)
                   FROM tbl_repl._dst_key_parts(target) AS k),
                  format('SELECT %s FROM (SELECT pg_catalog.count(*) FROM d) AS done', tbl_repl._in_time('$1')))
    FROM tbl_repl._upsert_parts(target) AS p
$function$;
COMMENT ON FUNCTION tbl_repl._prepare_sql(tbl_repl.target) IS
    'PREPARE statements for the single-row messages of a target';

-- Creates or replaces render_N, row_N, page_N, connect_N and digest_N; the owner of the definition owns them, and only
-- the owner of the extension may call them.
CREATE OR REPLACE FUNCTION tbl_repl._rebuild_target(target_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    signature text;
BEGIN
    EXECUTE tbl_repl._render_sql(target_id);
    EXECUTE tbl_repl._row_sql(target_id);
    EXECUTE tbl_repl._page_sql(target_id);
    EXECUTE tbl_repl._digest_sql(target_id);
    EXECUTE tbl_repl._connect_sql(target_id);
    FOREACH signature IN ARRAY tbl_repl._target_functions(target_id) LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', signature);
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', signature, tbl_repl._owner());
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._rebuild_target(integer) IS
    'makes the generated functions of a target what the catalog says';

CREATE OR REPLACE FUNCTION tbl_repl._target_functions(target_id integer)
RETURNS text[]
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT ARRAY[format('tbl_repl.render_%s(text[], boolean, boolean, text)', target_id),
                 format('tbl_repl.page_%s(text, integer)', target_id),
                 format('tbl_repl.connect_%s(text, timestamptz, timestamptz)', target_id),
                 format('tbl_repl.row_%s(text, numeric)', target_id),
                 format('tbl_repl.digest_%s(text, text, integer)', target_id)]
$function$;
COMMENT ON FUNCTION tbl_repl._target_functions(integer) IS
    'signatures of the functions generated for a target';
