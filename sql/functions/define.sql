-- Define: from what a user writes to what is kept of a target, checked on both sides.
--
-- Promises that names in filters and maps mean for ever what they meant to the caller, and that what cannot work is refused
-- with the reason before anything is changed.  Nothing here writes.

CREATE OR REPLACE FUNCTION tbl_repl._check_words(
    mode           text,
    operations     text[],
    on_conflict    text,
    forward        text,
    timeout        interval
)
RETURNS void
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    operation text;
BEGIN
    PERFORM tbl_repl._check_word('mode', mode, '{sync,tolerant,async}');
    IF coalesce(cardinality(operations), 0) = 0 OR EXISTS (SELECT FROM unnest(operations) AS o WHERE o IS NULL) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = CASE WHEN cardinality(operations) > 0 THEN 'operations contains NULL' ELSE 'operations is empty' END,
            DETAIL  = 'A target needs at least one operation.',
            HINT    = 'Use one or more of: insert, update, delete, truncate.';
    END IF;
    FOREACH operation IN ARRAY operations LOOP
        PERFORM tbl_repl._check_word('operation', operation, '{insert,update,delete,truncate}');
    END LOOP;
    PERFORM tbl_repl._check_word('conflict policy', on_conflict, '{overwrite,keep,newest,error}');
    PERFORM tbl_repl._check_word('forward rule', forward, '{local,any}');
    IF timeout IS NULL OR timeout < interval '100 milliseconds' OR timeout > interval '1 day' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('invalid timeout: %s', coalesce(timeout::text, 'NULL')),
            HINT    = 'Give an interval from 100 ms to 1 day.';
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_words(text, text[], text, text, interval) IS
    'refuses unknown modes, operations and policies';

CREATE OR REPLACE FUNCTION tbl_repl._check_word(what text, word text, accepted text[])
RETURNS void
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF word IS NULL OR word <> ALL (accepted) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('unknown %s: %s', what, coalesce(quote_literal(word), 'NULL')),
            HINT    = format('Use one of: %s.', array_to_string(accepted, ', '));
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_word(text, text, text[]) IS 'refuses a word that is not in the list (22023)';

CREATE OR REPLACE FUNCTION tbl_repl._parse_dst_table(dst_table text)
RETURNS name[]
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    parts text[];
BEGIN
    BEGIN
        parts := parse_ident(dst_table);
    EXCEPTION WHEN invalid_parameter_value THEN
        NULL;
    END;
    IF dst_table IS NOT NULL AND coalesce(cardinality(parts), 0) NOT IN (1, 2) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('invalid dst_table: %s', quote_literal(dst_table)),
            HINT    = 'Give ''schema.table'', or ''table'' for one in the source''s schema; quote names as in SQL.';
    END IF;
    RETURN parts::name[];
END
$function$;
COMMENT ON FUNCTION tbl_repl._parse_dst_table(text) IS 'schema, where given, and name of a table on the target (22023)';

-- _resolve(source_table, expression, path, condition): the expression over a row called s with every
-- name resolved as the given search_path resolves it now; as a view would keep it, and taken from one.
-- Errors: what PostgreSQL says of the expression; 42601 for one that is more than an expression.
CREATE OR REPLACE FUNCTION tbl_repl._resolve(
    source_table regclass,
    expression   text,
    path         text,
    what         text,
    OUT resolved text,
    OUT type_id  oid
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on SET quote_all_identifiers = off
AS $function$
DECLARE
    view_name    text := format('tbl_repl.resolving_%s', pg_backend_pid());
    source_name  text := source_table::text;
    probe        refcursor;
    definition   text;
    parts        text[];
    error_text   text;
    error_code   text;
    error_hint   text;
BEGIN
    BEGIN
        PERFORM set_config('search_path', path, true);
        -- A cursor takes one query only, and WHERE neither aggregates nor sets.  What closes the CASE here
        -- cannot close the parentheses below as well.
        OPEN probe FOR EXECUTE pg_catalog.format(E'SELECT FROM %s AS s WHERE false AND CASE WHEN true THEN %s\nEND IS NULL', source_name, expression);
        CLOSE probe;
        OPEN probe FOR EXECUTE pg_catalog.format(E'SELECT (%s\n) AS tbl_repl_x FROM %s AS s WHERE false', expression, source_name);
        CLOSE probe;
        EXECUTE pg_catalog.format(E'CREATE VIEW %s AS SELECT (%s\n) AS tbl_repl_x FROM %s AS s', view_name, expression, source_name);
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    EXCEPTION WHEN assert_failure OR OTHERS THEN
        GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_code = RETURNED_SQLSTATE, error_hint = PG_EXCEPTION_HINT;
        IF error_code = '42601' THEN
            error_text := coalesce(tbl_repl._syntax_error(source_table, expression), error_text);
        END IF;
        RAISE EXCEPTION USING
            ERRCODE = CASE WHEN error_code = '42P11' THEN '42601' ELSE error_code END,
            MESSAGE = format('%s does not fit table %s: %s', what, source_table, error_text),
            DETAIL  = CASE WHEN btrim(expression) = '' THEN 'The expression is empty.' ELSE format('Expression: %s', expression) END,
            HINT    = concat('Write one SQL expression over the columns of the source table.',
                             -- PostgreSQL has a hint of its own where the table itself is meant
                             CASE WHEN error_code = '42P01' AND error_hint <> '' THEN ' The row is called s in it, not by the name of the table.'
                                  WHEN error_code IN ('42883', '42704', '42P01', '3F000')
                                  THEN format(' Names are looked up in %s, the search_path when it was given: give it again to have it changed.',
                                              coalesce(nullif(path, ''), 'pg_catalog')) END);
    END;
    definition := pg_get_viewdef(view_name::regclass);
    SELECT a.atttypid INTO type_id FROM pg_attribute AS a WHERE a.attrelid = view_name::regclass AND a.attname = 'tbl_repl_x';
    parts := regexp_match(definition, format(E'^\\s*SELECT\\s+(.*) AS tbl_repl_x\\s+FROM (?:ONLY )?%s s;$',
                                             regexp_replace(source_table::text, '([^A-Za-z0-9_ ])', E'\\\\\\1', 'g')));
    EXECUTE format('DROP VIEW %s', view_name);
    IF parts IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'syntax_error',
            MESSAGE = format('%s is more than one expression', what),
            DETAIL  = format('Expression: %s', expression),
            HINT    = 'Write one SQL expression over the columns of the source table.';
    END IF;
    resolved := parts[1];
END
$function$;
COMMENT ON FUNCTION tbl_repl._resolve(regclass, text, text, text) IS
    'checks an expression over the source row and resolves its names';

-- What PostgreSQL takes into an index it has looked through: no sub-select, and immutable functions only.  The row is called s.
CREATE OR REPLACE FUNCTION tbl_repl._is_immutable(source_table regclass, expression text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp SET client_min_messages = warning
AS $function$
BEGIN
    EXECUTE format('CREATE TEMP TABLE s (LIKE %s)', source_table);
    EXECUTE format('CREATE INDEX ON pg_temp.s ((%s))', expression);
    DROP TABLE pg_temp.s;
    RETURN true;
EXCEPTION WHEN assert_failure OR OTHERS THEN
    RETURN false;
END
$function$;
COMMENT ON FUNCTION tbl_repl._is_immutable(regclass, text) IS
    'whether an expression says the same of a row whoever evaluates it, and whenever';

-- What follows an expression in a query is not the user's, and what is wrong with the expression may be told of that:
-- here nothing follows.
CREATE OR REPLACE FUNCTION tbl_repl._syntax_error(source_table regclass, expression text)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $function$
DECLARE
    probe refcursor;
BEGIN
    OPEN probe FOR EXECUTE format('SELECT FROM %s AS s WHERE false AND %s', source_table, expression);
    CLOSE probe;
    RETURN NULL;
EXCEPTION
    WHEN syntax_error THEN
        RETURN replace(SQLERRM, 'end of input', 'end of expression');
    WHEN assert_failure OR OTHERS THEN
        RETURN NULL;  -- its syntax is right, as far as it goes
END
$function$;
COMMENT ON FUNCTION tbl_repl._syntax_error(regclass, text) IS
    'the syntax error in an expression, in words that fit what was written';

-- _define(target, source): fills in what follows from what the user said: sent columns,
-- expressions, filter, key on the target; checks it against both sides.  Opens a connection.
CREATE OR REPLACE FUNCTION tbl_repl._define(
    target tbl_repl.target,
    source tbl_repl.source
)
RETURNS tbl_repl.target
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    sent     record := tbl_repl._define_sent(target, source);
    facts    jsonb;
    conn     text;
    deadline timestamptz;
BEGIN
    target := sent.target;
    conn := tbl_repl._connect_to_define(target);
    deadline := clock_timestamp() + target.timeout * 2;
    facts := tbl_repl._remote_facts(conn, target.dst_schema, target.dst_name, deadline);
    IF tbl_repl._is_same_table(source.source_table, (facts ->> 'oid')::oid, conn, deadline) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('source and target are the same table: %s', source.source_table),
            DETAIL  = format('Server %I leads to this database.', target.server),
            HINT    = 'Name another table in dst_table, or a server that leads to another database.';
    END IF;
    PERFORM tbl_repl._check_remote_table(target, facts);
    PERFORM tbl_repl._check_key_types(target, source, facts -> 'columns');
    PERFORM tbl_repl._check_remote_columns(target, sent.types, facts -> 'columns');
    -- What a plain unique clash may be about; the key itself is none.
    target.remote := facts || jsonb_build_object('unique',
        (SELECT coalesce(jsonb_agg(u), '[]') FROM jsonb_array_elements(facts -> 'unique') AS u
         WHERE NOT (u @> to_jsonb(target.dst_keys) AND u <@ to_jsonb(target.dst_keys))));
    -- one that is async now may have some from before
    target.cascades := (facts ->> 'cascades')::boolean;
    target.receipts := (facts ->> 'receipts')::boolean AND (target.mode <> 'async' OR coalesce(target.receipts, false));
    IF (facts ->> 'extension')::boolean THEN
        target.remote := target.remote || tbl_repl._remote_node(conn, deadline);
    END IF;
    PERFORM tbl_repl._check_policy(target, source);
    RETURN target;
END
$function$;
COMMENT ON FUNCTION tbl_repl._define(tbl_repl.target, tbl_repl.source) IS
    'works out and checks the definition of a target on both sides';

-- Called before the table is locked, too: what hangs must not hang its readers and writers.
CREATE OR REPLACE FUNCTION tbl_repl._connect_to_define(target tbl_repl.target)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    conn     text := tbl_repl._connection_name(target.server, current_user, target.timeout);
    deadline timestamptz := clock_timestamp() + target.timeout * 2;
BEGIN
    IF NOT tbl_repl._is_alive(conn, deadline) THEN
        PERFORM tbl_repl._open(conn, target.server, target.timeout, deadline);
    END IF;
    RETURN conn;
END
$function$;
COMMENT ON FUNCTION tbl_repl._connect_to_define(tbl_repl.target) IS
    'the connection over which a target is looked at when it is defined, open and alive';

-- _define_sent(target, source): the part of the definition that this side decides; types: those of what is sent, in order.
CREATE OR REPLACE FUNCTION tbl_repl._define_sent(
    INOUT target tbl_repl.target,
    source       tbl_repl.source,
    OUT types    oid[]
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item  record;
    expr  record;
    plain name;
BEGIN
    types := '{}';
    PERFORM tbl_repl._check_columns(source.source_table, 'columns', target.columns);
    IF jsonb_typeof(target.column_map) <> 'object'
       OR EXISTS (SELECT FROM jsonb_each(CASE jsonb_typeof(target.column_map) WHEN 'object' THEN target.column_map END) AS m WHERE jsonb_typeof(m.value) <> 'string') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'column_map must be a JSON object of strings',
            HINT    = 'For instance {"email": "md5(email)"}: column of the target, SQL expression over the source row.';
    END IF;

    target.sent_columns := '{}';
    target.sent_exprs := '{}';
    FOR item IN
        SELECT a.attname AS name, format('s.%I', a.attname) AS expression, a.atttypid AS type_id, a.attname AS plain
        FROM pg_attribute AS a
        WHERE a.attrelid = source.source_table AND a.attnum > 0 AND NOT a.attisdropped
          AND CASE WHEN target.columns IS NULL THEN a.attgenerated = '' ELSE a.attname = ANY (target.columns) END
          AND a.attname <> ALL (ARRAY(SELECT k::name FROM jsonb_object_keys(target.column_map) AS k))
        ORDER BY a.attnum
    LOOP
        target.sent_columns := array_append(target.sent_columns, item.name);
        target.sent_exprs := array_append(target.sent_exprs, item.expression);
        types := array_append(types, item.type_id);
    END LOOP;
    FOR item IN SELECT m.key::name AS name, m.value AS expression FROM jsonb_each_text(target.column_map) AS m ORDER BY m.key COLLATE "C" LOOP
        IF item.name = ANY (target.sent_columns) THEN
            RAISE EXCEPTION USING
                ERRCODE = 'duplicate_column',
                MESSAGE = format('column_map names column %I twice', item.name),
                DETAIL  = 'Names are cut at 63 bytes, as everywhere in SQL.';
        END IF;
        expr := tbl_repl._resolve(source.source_table, item.expression, target.map_path, format('column_map entry %s', quote_ident(item.name)));
        -- an entry that is nothing but a column is a rename
        SELECT a.attname INTO plain FROM pg_attribute AS a
        WHERE a.attrelid = source.source_table AND a.attnum > 0 AND NOT a.attisdropped
          AND expr.resolved IN (quote_ident(a.attname), format('s.%I', a.attname));
        target.sent_columns := array_append(target.sent_columns, item.name);
        target.sent_exprs := array_append(target.sent_exprs, CASE WHEN plain IS NULL THEN expr.resolved ELSE format('s.%I', plain) END);
        types := array_append(types, expr.type_id);
    END LOOP;
    target.filter_expr := NULL;
    target.filter_is_immutable := true;
    IF target.row_filter IS NOT NULL THEN
        expr := tbl_repl._resolve(source.source_table, target.row_filter, target.filter_path, 'row_filter');
        IF tbl_repl._base_type(expr.type_id) <> 'boolean'::regtype THEN
            RAISE EXCEPTION USING
                ERRCODE = 'datatype_mismatch',
                MESSAGE = format('row_filter must be boolean, not %s', format_type(expr.type_id, -1)),
                DETAIL  = format('Expression: %s', target.row_filter),
                HINT    = 'Write one boolean SQL expression over the columns of the source table.';
        END IF;
        target.filter_expr := expr.resolved;
        target.filter_is_immutable := tbl_repl._is_immutable(source.source_table, target.filter_expr);
    END IF;

    target.dst_keys := '{}';
    FOREACH plain IN ARRAY source.key_columns LOOP
        SELECT target.sent_columns[i] INTO item FROM generate_subscripts(target.sent_columns, 1) AS i
        WHERE target.sent_exprs[i] = format('s.%I', plain)
        ORDER BY target.sent_columns[i] = plain DESC, i LIMIT 1;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING
                ERRCODE = 'invalid_table_definition',
                MESSAGE = format('key column %I is not sent', plain),
                DETAIL  = 'A target needs the whole key to find the row on the other side.',
                HINT    = 'Name it in columns, or give it another name in column_map by an entry that is nothing but the column.';
        END IF;
        target.dst_keys := array_append(target.dst_keys, item.sent_columns);
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._define_sent(tbl_repl.target, tbl_repl.source) IS
    'works out and checks what a target is sent: columns, expressions, filter, key';

-- _remote_facts(conn, schema, name, deadline): what the target's catalogs say of the table, as jsonb: columns
-- [{name, type, base, category, length, notnull, identity, generated, has_default, domain_of, fuzzy, equals, greater}], keys
-- (unique indexes an upsert may use), unique (column lists of every unique index and exclusion constraint), referenced, cascades
-- (a foreign key with an action refers to it), follows (the tables to which one of its own refers), unreferred (condition
-- that no row refers to a row d), followed (columns that such a key refers to, and whose changes it acts on),
-- usable (its schema), writable, policies (row-level security may hide rows from our role, or refuse them), user, oid, kind, version, extension, receipts.
CREATE OR REPLACE FUNCTION tbl_repl._remote_facts(
    conn       text,
    dst_schema name,
    dst_name   name,
    deadline   timestamptz
)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    answer text;
BEGIN
    answer := tbl_repl._call(conn, format($remote$
        SELECT pg_catalog.set_config('search_path', 'pg_catalog', true);
        -- foreign keys: match says that a row r refers to a row d
        WITH fk AS NOT MATERIALIZED (
            SELECT r.*, k.match, k.columns
            FROM pg_constraint AS r
            CROSS JOIN LATERAL (
                SELECT string_agg(format('r.%%I = d.%%I', h.attname, p.attname), ' AND ' ORDER BY n) AS match, jsonb_agg(p.attname) AS columns
                FROM unnest(r.conkey, r.confkey) WITH ORDINALITY AS u (here, there, n)
                JOIN pg_attribute AS h ON h.attrelid = r.conrelid AND h.attnum = u.here
                JOIN pg_attribute AS p ON p.attrelid = r.confrelid AND p.attnum = u.there) AS k
            WHERE r.contype = 'f')
        SELECT jsonb_build_object(
            'oid', c.oid,
            'kind', c.relkind,
            'version', current_setting('server_version_num')::int,
            'user', current_user,
            'read_only', current_setting('transaction_read_only')::boolean,
            'usable', has_schema_privilege(n.oid, 'USAGE'),
            'writable', has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE') AND has_table_privilege(c.oid, 'SELECT'),
            -- but for policies that let our role see and write every row
            'policies', row_security_active(c.oid) AND (
                WITH p AS (
                    SELECT y.polcmd, y.polpermissive, pg_get_expr(y.polqual, c.oid) AS uses,
                           coalesce(pg_get_expr(y.polwithcheck, c.oid), pg_get_expr(y.polqual, c.oid)) AS checks
                    FROM pg_policy AS y
                    WHERE y.polrelid = c.oid AND EXISTS (SELECT FROM unnest(y.polroles) AS r (id) WHERE r.id = 0 OR pg_has_role(r.id, 'USAGE')))
                SELECT EXISTS (SELECT FROM p WHERE NOT p.polpermissive)
                    OR EXISTS (SELECT FROM unnest('{r,a,w,d}'::"char"[]) AS o (cmd)
                               WHERE NOT EXISTS (SELECT FROM p WHERE p.polpermissive AND p.polcmd IN (o.cmd, '*')
                                                 AND p.checks = 'true' AND (o.cmd = 'a' OR p.uses = 'true')))),
            'referenced', EXISTS (SELECT FROM pg_constraint AS r WHERE r.confrelid = c.oid AND r.contype = 'f'),
            'cascades', EXISTS (SELECT FROM pg_constraint AS r WHERE r.confrelid = c.oid AND r.contype = 'f' AND r.confdeltype IN ('c', 'n', 'd')),
            'follows', (SELECT coalesce(jsonb_agg(jsonb_build_object('schema', y.nspname, 'name', x.relname, 'action', r.confdeltype, 'match', r.match, 'columns', r.columns)), '[]')
                        FROM fk AS r JOIN pg_class AS x ON x.oid = r.confrelid JOIN pg_namespace AS y ON y.oid = x.relnamespace
                        WHERE r.conrelid = c.oid AND r.confdeltype IN ('c', 'n', 'd')),
            'unreferred', (SELECT coalesce(string_agg(format(' AND NOT EXISTS (SELECT FROM %%s AS r WHERE %%s%%s)', r.conrelid::regclass, r.match,
                                                    CASE WHEN r.conrelid = c.oid THEN ' AND (r.tableoid, r.ctid) <> (d.tableoid, d.ctid)' END), ''), '')
                                  -- those that came later are not known here
                                  || format(' AND %%s = (SELECT pg_catalog.count(*) FROM pg_catalog.pg_constraint AS f WHERE f.contype = ''f'' '
                                            'AND f.conparentid = 0 AND f.confrelid = %%L::pg_catalog.regclass)', count(*), c.oid::regclass)
                           FROM fk AS r WHERE r.confrelid = c.oid AND r.conparentid = 0),
            'followed', (SELECT coalesce(jsonb_agg(DISTINCT a.attname), '[]') FROM pg_constraint AS r
                         JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = ANY (r.confkey)
                         WHERE r.confrelid = c.oid AND r.contype = 'f' AND r.confupdtype IN ('c', 'n', 'd')),
            'extension', EXISTS (SELECT FROM pg_class AS e JOIN pg_namespace AS x ON x.oid = e.relnamespace
                                 WHERE x.nspname = 'tbl_repl' AND e.relname = 'target_state'),
            'receipts', %s,
            'columns', (
                SELECT jsonb_agg(jsonb_build_object(
                    'name', a.attname, 'type', format_type(a.atttypid, -1), 'base', b.typname, 'category', b.typcategory,
                    'length', CASE WHEN b.typname IN ('varchar', 'bpchar') AND a.atttypmod > 4 THEN a.atttypmod - 4 END,
                    'notnull', a.attnotnull, 'identity', a.attidentity, 'generated', a.attgenerated <> '',
                    'has_default', a.atthasdef OR a.attidentity <> '' OR t.typdefault IS NOT NULL,
                    'domain_of', (SELECT format('%%I.%%I', y.nspname, b.typname) FROM pg_namespace AS y WHERE t.typtype = 'd' AND y.oid = b.typnamespace),
                    'fuzzy', coalesce((SELECT NOT l.collisdeterministic FROM pg_collation AS l WHERE l.oid = a.attcollation), false),
                    'equals', op.equals, 'greater', op.greater) ORDER BY a.attnum)
                FROM pg_attribute AS a
                JOIN pg_type AS t ON t.oid = a.atttypid
                JOIN pg_type AS b ON b.oid = CASE WHEN t.typtype = 'd' THEN (
                    WITH RECURSIVE d AS (SELECT t.oid, t.typbasetype, t.typtype UNION ALL
                                         SELECT u.oid, u.typbasetype, u.typtype FROM d JOIN pg_type AS u ON u.oid = d.typbasetype WHERE d.typtype = 'd')
                    SELECT d.oid FROM d WHERE d.typtype <> 'd') ELSE t.oid END
                CROSS JOIN LATERAL (
                    SELECT max(format('OPERATOR(%%I.%%s)', n.nspname, o.oprname)) FILTER (WHERE p.amopstrategy = 3) AS equals,
                           max(format('OPERATOR(%%I.%%s)', n.nspname, o.oprname)) FILTER (WHERE p.amopstrategy = 5) AS greater
                    FROM pg_opclass AS k
                    JOIN pg_am AS m ON m.oid = k.opcmethod AND m.amname = 'btree'
                    JOIN pg_amop AS p ON p.amopfamily = k.opcfamily AND p.amoplefttype = k.opcintype AND p.amoprighttype = k.opcintype
                    JOIN pg_operator AS o ON o.oid = p.amopopr JOIN pg_namespace AS n ON n.oid = o.oprnamespace
                    WHERE k.opcdefault AND k.opcintype = b.oid) AS op
                WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
            'keys', (SELECT coalesce(jsonb_agg(k.columns), '[]') FROM pg_index AS i CROSS JOIN LATERAL (
                        SELECT jsonb_agg(a.attname ORDER BY n) AS columns FROM generate_series(0, i.indnkeyatts - 1) AS n
                        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[n]) AS k
                     WHERE i.indrelid = c.oid AND i.indisunique AND NOT i.indisexclusion AND i.indisvalid AND i.indimmediate
                       AND i.indpred IS NULL AND i.indexprs IS NULL),
            'unique', (SELECT coalesce(jsonb_agg(k.columns), '[]') FROM pg_index AS i CROSS JOIN LATERAL (
                        SELECT jsonb_agg(a.attname ORDER BY n) AS columns FROM generate_series(0, i.indnkeyatts - 1) AS n
                        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[n]) AS k
                     WHERE i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion) AND k.columns IS NOT NULL))
        FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = %L AND c.relname = %L$remote$, tbl_repl._may_leave_receipts(), dst_schema, dst_name), deadline);
    IF answer NOT LIKE '{%' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_table',
            MESSAGE = format('table %I.%I does not exist on the target', dst_schema, dst_name),
            HINT    = 'Create it there, or name another one in dst_table.';
    END IF;
    RETURN answer::jsonb;
END
$function$;
COMMENT ON FUNCTION tbl_repl._remote_facts(text, name, name, timestamptz) IS
    'columns, keys and privileges of the target''s table';

-- A physical copy of this cluster has the same identifiers, and a role may be allowed to see few of them; but only in this
-- very database can the lock be seen that we hold on the source.
CREATE OR REPLACE FUNCTION tbl_repl._is_same_table(
    source_table regclass,
    remote_oid   oid,
    conn         text,
    deadline     timestamptz
)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RETURN source_table = remote_oid AND tbl_repl._call(conn, format(
        'SELECT EXISTS (SELECT FROM pg_catalog.pg_locks AS l JOIN pg_catalog.pg_database AS d ON d.oid = l.database '
        'WHERE d.datname = pg_catalog.current_database() AND l.locktype = ''relation'' AND l.relation = %s '
        'AND l.pid = %s AND l.mode = ''ShareRowExclusiveLock'' AND l.granted)', remote_oid, pg_backend_pid()), deadline)::boolean;
END
$function$;
COMMENT ON FUNCTION tbl_repl._is_same_table(regclass, oid, text, timestamptz) IS
    'whether the target''s table is the source, which the caller has locked';

CREATE OR REPLACE FUNCTION tbl_repl._check_remote_table(target tbl_repl.target, facts jsonb)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF facts ->> 'kind' NOT IN ('r', 'p') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = format('%s on the target is %s', tbl_repl._dst_table(target),
                             CASE facts ->> 'kind' WHEN 'v' THEN 'a view' WHEN 'm' THEN 'a materialized view'
                                                   WHEN 'f' THEN 'a foreign table' ELSE 'no table' END),
            DETAIL  = 'Rows are written into ordinary and partitioned tables only.',
            HINT    = 'Name a table in dst_table.';
    ELSIF NOT (facts ->> 'usable')::boolean THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role %s may not use schema %I on the target', facts ->> 'user', target.dst_schema),
            HINT    = format('There: GRANT USAGE ON SCHEMA %I TO %I;', target.dst_schema, facts ->> 'user');
    ELSIF NOT coalesce((facts ->> 'writable')::boolean, false) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role %s may not write table %s on the target', facts ->> 'user', tbl_repl._dst_table(target)),
            HINT    = format('There: GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON %s TO %I;', tbl_repl._dst_table(target), facts ->> 'user');
    END IF;
    IF NOT EXISTS (SELECT FROM jsonb_array_elements(facts -> 'keys') AS k
                   WHERE k @> to_jsonb(target.dst_keys) AND k <@ to_jsonb(target.dst_keys)) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_table_definition',
            MESSAGE = format('table %s on the target has no unique index on (%s)', tbl_repl._dst_table(target),
                             (SELECT string_agg(quote_ident(k), ', ') FROM unnest(target.dst_keys) AS k)),
            DETAIL  = 'Rows are found there by the key of the source; the index must be neither partial nor deferrable.',
            HINT    = format('There: CREATE UNIQUE INDEX ON %s (%s);', tbl_repl._dst_table(target),
                             (SELECT string_agg(quote_ident(k), ', ') FROM unnest(target.dst_keys) AS k));
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_remote_table(tbl_repl.target, jsonb) IS
    'refuses a table on the target that rows cannot be written into';

CREATE OR REPLACE FUNCTION tbl_repl._check_remote_columns(target tbl_repl.target, types oid[], columns jsonb)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    fact     jsonb;
    sent     record;
    missing  name;
BEGIN
    FOR n IN 1 .. cardinality(target.sent_columns) LOOP
        SELECT c INTO fact FROM jsonb_array_elements(columns) AS c WHERE c ->> 'name' = target.sent_columns[n]::text;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING
                ERRCODE = 'undefined_column',
                MESSAGE = format('column %I of table %s does not exist on the target', target.sent_columns[n], tbl_repl._dst_table(target)),
                HINT    = 'Add it there, leave it out by columns, or give it another name by column_map.';
        ELSIF (fact ->> 'generated')::boolean THEN
            RAISE EXCEPTION USING
                ERRCODE = 'generated_always',
                MESSAGE = format('column %I of table %s is generated on the target', target.sent_columns[n], tbl_repl._dst_table(target)),
                HINT    = 'Leave it out by columns.';
        END IF;
        SELECT y.typcategory::text AS category, y.typname::text AS base INTO sent FROM pg_type AS y WHERE y.oid = tbl_repl._base_type(types[n]);
        -- Values travel as text, so much goes; what goes for no value at all is refused here.
        IF sent.category <> 'X' AND (
               fact ->> 'category' IN ('N', 'B', 'D', 'T') AND sent.category <> fact ->> 'category'
            OR (fact ->> 'category' IN ('A', 'C', 'E', 'G', 'I', 'R') OR fact ->> 'base' = 'uuid') AND sent.category NOT IN ('S', fact ->> 'category')
            OR fact ->> 'base' IN ('json', 'jsonb') AND sent.category IN ('D', 'T', 'G', 'I', 'R')
            OR fact ->> 'base' IN ('date', 'timestamp', 'timestamptz') AND sent.base IN ('time', 'timetz')
            OR fact ->> 'category' = 'N' AND fact ->> 'base' <> 'money' AND sent.base = 'money')
        THEN
            RAISE EXCEPTION USING
                ERRCODE = 'datatype_mismatch',
                MESSAGE = format('column %I is of type %s on the target, but type %s is sent', target.sent_columns[n],
                                 fact ->> 'type', format_type(types[n], -1)),
                HINT    = format('Cast it in column_map: {%s: "(...)::%s"}.', to_json(target.sent_columns[n]::text), fact ->> 'type');
        END IF;
    END LOOP;
    SELECT c ->> 'name' INTO missing FROM jsonb_array_elements(columns) AS c
    WHERE (c ->> 'notnull')::boolean AND NOT (c ->> 'has_default')::boolean AND NOT (c ->> 'generated')::boolean
      AND c ->> 'name' <> ALL (target.sent_columns::text[]);
    IF FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'not_null_violation',
            MESSAGE = format('column %I of table %s on the target is NOT NULL without a default, and not sent', missing, tbl_repl._dst_table(target)),
            HINT    = 'Send it, give it a default there, or drop its NOT NULL.';
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_remote_columns(tbl_repl.target, oid[], jsonb) IS
    'refuses columns that the table on the target cannot take, or would miss';

CREATE OR REPLACE FUNCTION tbl_repl._check_only_once(target tbl_repl.target, source_table regclass)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    -- also not by another key
    IF EXISTS (SELECT FROM tbl_repl.target AS t JOIN tbl_repl.source AS s USING (source_id)
               WHERE s.source_table = _check_only_once.source_table AND t.server = target.server AND t.dst_schema = target.dst_schema
                 AND t.dst_name = target.dst_name AND t.target_id IS DISTINCT FROM target.target_id) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('table %s is already replicated to %s on server %I', source_table, tbl_repl._dst_table(target), target.server),
            HINT    = 'Change it with tbl_repl.alter_target, or drop it first.';
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_only_once(tbl_repl.target, regclass) IS
    'refuses a second target of a table at the same place (42710)';
