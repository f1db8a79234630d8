-- Target: the verbs with which a user says what goes where.
--
-- Each either does all it is asked, on both sides, or leaves nothing behind.  They run as their caller, so
-- that PostgreSQL itself checks that he may put a trigger on the table.

-- add_target: defines a target.  Locks the table SHARE ROW EXCLUSIVE (writers wait) to the end of the
-- transaction; with initial_copy => 'now' that includes the copy, which takes place at its COMMIT.
-- Errors: 42704 server or user mapping, 22023 unknown word, 42P16 no usable key here or there, 42703 unknown
-- column, 42601 ... filter or map that does not parse or fit, 42710 defined already, 42501 not the owner,
-- 0A000 tables that cannot be captured, 25001 copy 'now' not under READ COMMITTED, 08* no connection.
-- Not pinned: names in row_filter and column_map mean what they mean to the caller.
CREATE OR REPLACE FUNCTION tbl_repl.add_target(
    source_table   regclass,
    server         name,
    dst_table      text DEFAULT NULL,
    mode           text DEFAULT 'tolerant',
    columns        name[] DEFAULT NULL,
    column_map     jsonb DEFAULT NULL,
    row_filter     text DEFAULT NULL,
    key_columns    name[] DEFAULT NULL,
    operations     text[] DEFAULT '{insert,update,delete,truncate}',
    initial_copy   text DEFAULT 'now',
    on_conflict    text DEFAULT 'overwrite',
    version_column name DEFAULT NULL,
    forward        text DEFAULT 'local',
    timeout        interval DEFAULT '5 s'
)
RETURNS integer
LANGUAGE plpgsql VOLATILE
AS $function$
BEGIN
    RETURN tbl_repl._add_target(source_table, server, dst_table, mode, columns, column_map, row_filter, key_columns,
                                operations, initial_copy, on_conflict, version_column, forward, timeout,
                                pg_catalog.array_to_string(ARRAY(
                                    SELECT pg_catalog.quote_ident(s) FROM pg_catalog.unnest(pg_catalog.current_schemas(false)) AS s), ', '));
END
$function$;
COMMENT ON FUNCTION tbl_repl.add_target(regclass, name, text, text, name[], jsonb, text, name[], text[], text, text, name, text, interval) IS
    'replicates a table, some of its columns or rows, to a table on another server; returns the target_id';

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
BEGIN
    BEGIN
        PERFORM set_config('search_path', path, true);
        -- A cursor takes one query only, and WHERE neither aggregates nor sets.  What closes the CASE here
        -- cannot close the parentheses below as well.
        OPEN probe FOR EXECUTE pg_catalog.format('SELECT FROM %s AS s WHERE false AND CASE WHEN true THEN %s%s', source_name, expression,
                                                 CASE WHEN what OPERATOR(pg_catalog.=) 'row_filter' THEN E'\nEND' ELSE E'\nEND IS NULL' END);
        CLOSE probe;
        OPEN probe FOR EXECUTE pg_catalog.format(E'SELECT (%s\n) AS tbl_repl_x FROM %s AS s WHERE false', expression, source_name);
        CLOSE probe;
        EXECUTE pg_catalog.format(E'CREATE VIEW %s AS SELECT (%s\n) AS tbl_repl_x FROM %s AS s', view_name, expression, source_name);
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    EXCEPTION WHEN assert_failure OR OTHERS THEN
        GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_code = RETURNED_SQLSTATE;
        IF error_code = '42601' THEN
            error_text := coalesce(tbl_repl._syntax_error(source_table, expression), error_text);
        END IF;
        RAISE EXCEPTION USING
            ERRCODE = CASE WHEN error_code = '42P11' THEN '42601' ELSE error_code END,
            MESSAGE = format('%s does not fit table %s: %s', what, source_table, error_text),
            DETAIL  = CASE WHEN btrim(expression) = '' THEN 'The expression is empty.' ELSE format('Expression: %s', expression) END,
            HINT    = concat('Write one SQL expression over the columns of the source table.',
                             CASE WHEN error_code IN ('42883', '42704', '42P01', '3F000')
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

-- _remote_facts(conn, schema, name, deadline): what the target's catalogs say of the table, as jsonb: columns
-- [{name, type, base, category, length, notnull, identity, generated, has_default, domain_of, fuzzy, equals, greater}], keys
-- (unique indexes an upsert may use), unique (column lists of every unique index and exclusion constraint), referenced,
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
            'referenced', EXISTS (SELECT FROM pg_constraint AS r WHERE r.confrelid = c.oid AND r.contype = 'f' AND r.conrelid <> c.oid
                                  OR r.confrelid = c.oid AND r.contype = 'f' AND r.confdeltype <> 'a'),
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
    IF target.row_filter IS NOT NULL THEN
        target.filter_expr := (tbl_repl._resolve(source.source_table, target.row_filter, target.filter_path, 'row_filter')).resolved;
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
    category text;
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
        SELECT y.typcategory INTO category FROM pg_type AS y WHERE y.oid = tbl_repl._base_type(types[n]);
        -- Values travel as text, so much goes; what goes for no value at all is refused here.
        IF fact ->> 'category' IN ('N', 'B', 'D', 'T') AND category <> fact ->> 'category' AND category <> 'X' THEN
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

CREATE OR REPLACE FUNCTION tbl_repl._add_target(
    source_table   regclass,
    server         name,
    dst_table      text,
    mode           text,
    columns        name[],
    column_map     jsonb,
    row_filter     text,
    key_columns    name[],
    operations     text[],
    initial_copy   text,
    on_conflict    text,
    version_column name,
    forward        text,
    timeout        interval,
    path           text
)
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET quote_all_identifiers = off
AS $function$
DECLARE
    source  tbl_repl.source%ROWTYPE;
    target  tbl_repl.target%ROWTYPE;
    rel     record;
    parts   text[];
    owner   name;
    whole   integer[];
BEGIN
    IF source_table IS NULL OR server IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'source_table and server must be given';
    END IF;
    PERFORM tbl_repl._check_words(mode, operations, on_conflict, forward, timeout);
    PERFORM tbl_repl._check_word('initial copy', initial_copy, '{now,background,none}');
    IF NOT EXISTS (SELECT FROM pg_foreign_server AS f WHERE f.srvname = server) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = format('server %I does not exist', server),
            HINT    = 'Create it with CREATE SERVER ... FOREIGN DATA WRAPPER dblink_fdw OPTIONS (host ..., port ..., dbname ...), and a user mapping.';
    END IF;
    SELECT c.relname, c.relkind, c.relpersistence, c.relispartition, c.relowner, n.nspname INTO rel
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = source_table;
    IF rel.nspname = 'tbl_repl' OR rel.relkind NOT IN ('r', 'p') OR rel.relpersistence = 't' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = format('%s cannot be replicated', source_table),
            DETAIL  = 'Only ordinary and partitioned tables can: views, foreign and temporary tables have no triggers that see every change.';
    ELSIF NOT pg_has_role(current_user, rel.relowner, 'USAGE') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('must be owner of table %s', source_table),
            HINT    = 'Let the owner of the table call this, or a member of that role.';
    ELSIF NOT rel.relispartition AND rel.relkind = 'r'
          AND EXISTS (SELECT FROM pg_inherits AS i WHERE source_table IN (i.inhparent, i.inhrelid)) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = format('table %s takes part in inheritance', source_table),
            DETAIL  = 'Triggers of a parent do not see what is written to its children.',
            HINT    = 'Use declarative partitioning, or replicate a table without children.';
    ELSIF row_security_active(source_table) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('row-level security hides rows of table %s from role %I', source_table, current_user),
            DETAIL  = 'A target gets all rows that its definer sees; one that is hidden could not be told from one that was deleted.',
            HINT    = format('ALTER TABLE %s NO FORCE ROW LEVEL SECURITY; or define the target as a role with BYPASSRLS, and choose rows by row_filter.', source_table);
    ELSIF initial_copy = 'now' AND current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'active_sql_transaction',
            MESSAGE = 'initial_copy => ''now'' needs READ COMMITTED',
            DETAIL  = 'An older snapshot does not show rows that were committed before the triggers were there.',
            HINT    = 'Use initial_copy => ''background'', or another transaction.';
    END IF;
    parts := tbl_repl._parse_dst_table(coalesce(dst_table, format('%I.%I', rel.nspname, rel.relname)));

    target.owner := current_user;
    target.server := server;
    target.dst_schema := CASE WHEN cardinality(parts) = 2 THEN parts[1] ELSE rel.nspname::text END;
    target.dst_name := parts[cardinality(parts)];
    target.mode := mode;
    target.columns := columns;
    target.column_map := nullif(column_map, '{}');
    target.row_filter := nullif(btrim(row_filter), '');
    target.operations := operations;
    target.on_conflict := on_conflict;
    target.version_column := version_column;
    target.forward := forward;
    target.timeout := timeout;
    target.map_path := path;
    target.filter_path := path;
    source.source_table := source_table;
    source.key_columns := tbl_repl._find_key(source_table, key_columns);
    PERFORM tbl_repl._define_sent(target, source);
    PERFORM tbl_repl._connect_to_define(target);

    -- Writers in flight have ended when this is granted; the next ones meet the triggers.
    EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', source_table);
    SELECT * INTO source FROM tbl_repl.source AS s
    WHERE s.source_table = _add_target.source_table AND s.key_columns = tbl_repl._find_key(_add_target.source_table, _add_target.key_columns);
    IF NOT FOUND THEN
        INSERT INTO tbl_repl.source (source_table, key_columns, key_numbers, capture)
        SELECT source_table, k.names, tbl_repl._column_numbers(source_table, k.names),
               tbl_repl._capture_kind(source_table)
        FROM tbl_repl._find_key(source_table, key_columns) AS k (names)
        RETURNING * INTO source;
    ELSE
        SELECT r.rolname INTO owner FROM pg_proc AS f JOIN pg_roles AS r ON r.oid = f.proowner
        WHERE f.pronamespace = 'tbl_repl'::regnamespace AND f.proname = format('capture_%s', source.source_id);
        IF NOT pg_has_role(current_user, owner, 'USAGE') THEN
            RAISE EXCEPTION USING
                ERRCODE = 'insufficient_privilege',
                MESSAGE = format('table %s is replicated by role %I already', source_table, owner),
                HINT    = format('Define all targets of a table as the same role: SET ROLE %I.', owner);
        END IF;
    END IF;

    target.source_id := source.source_id;
    target.generation := tbl_repl._new_generation();
    PERFORM tbl_repl._check_only_once(target, source_table);
    target := tbl_repl._define(target, source);
    target.target_id := nextval('tbl_repl.target_target_id_seq');
    whole := tbl_repl._truncate_whole(target);
    INSERT INTO tbl_repl.target SELECT target.*;
    INSERT INTO tbl_repl.progress (target_id, position) VALUES (target.target_id, pg_current_snapshot());
    INSERT INTO tbl_repl.target_state (target_id, status, system_identifier, database_id, timeline, copy_after)
    SELECT target.target_id, CASE initial_copy WHEN 'background' THEN 'copying' ELSE 'ok' END,
           p.system_identifier, p.database_id, p.timeline, CASE initial_copy WHEN 'background' THEN '{}'::text[] END
    FROM tbl_repl._place() AS p;
    PERFORM tbl_repl._rebuild_target(target.target_id);
    PERFORM tbl_repl._rebuild_capture(source.source_id);
    PERFORM tbl_repl._rebuild_neighbours(target);
    PERFORM tbl_repl._check_truncates(whole);
    PERFORM tbl_repl._prepare_now(target);
    PERFORM tbl_repl._rank_sources();
    PERFORM tbl_repl._boot();
    IF initial_copy = 'now' THEN
        -- By the flush at our commit: were we to roll back, nothing may be there.
        INSERT INTO tbl_repl.stash (source_id, target_id, op, row_count) VALUES (source.source_id, target.target_id, 'C', 1);
        INSERT INTO tbl_repl.flush DEFAULT VALUES ON CONFLICT DO NOTHING;
    END IF;
    IF on_conflict = 'newest' AND initial_copy <> 'none' THEN
        PERFORM tbl_repl._queue_tombstones(target);
    END IF;
    RETURN target.target_id;
END
$function$;
COMMENT ON FUNCTION tbl_repl._add_target(regclass, name, text, text, name[], jsonb, text, name[], text[], text, text, name, text, interval, text) IS
    'add_target with the caller''s search_path';

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

-- Several tables may be replicated into one: then each has to capture the keys that a TRUNCATE removes.
CREATE OR REPLACE FUNCTION tbl_repl._rebuild_neighbours(target tbl_repl.target)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    neighbour integer;
BEGIN
    FOR neighbour IN
        SELECT DISTINCT o.source_id
        FROM tbl_repl.target AS o
        JOIN tbl_repl.source AS s USING (source_id)
        JOIN pg_class AS c ON c.oid = s.source_table
        WHERE o.server = target.server AND o.dst_schema = target.dst_schema AND o.dst_name = target.dst_name
          AND o.source_id <> target.source_id
        ORDER BY 1
    LOOP
        PERFORM tbl_repl._rebuild_capture(neighbour);
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._rebuild_neighbours(tbl_repl.target) IS
    'rebuilds the triggers of the other tables that are replicated into the same one';

-- Part of the names of prepared statements: never one that was used before, by a transaction that was rolled
-- back or an extension that was dropped, for some session may still have prepared it.
CREATE OR REPLACE FUNCTION tbl_repl._new_generation()
RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT ((extract(epoch FROM clock_timestamp()) * 1000)::bigint % 2147483647)::integer
$function$;
COMMENT ON FUNCTION tbl_repl._new_generation() IS 'a number that no definition of a target has had';

-- The connection over which the target was looked at serves this session's writes from now on; other
-- sessions prepare when they connect, or when the target does not know a statement.
CREATE OR REPLACE FUNCTION tbl_repl._prepare_now(target tbl_repl.target)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF target.mode <> 'async' THEN
        PERFORM tbl_repl._call(tbl_repl._connection_name(target.server, current_user, target.timeout),
                               tbl_repl._prepare_sql(target), clock_timestamp() + target.timeout);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._prepare_now(tbl_repl.target) IS
    'prepares the single-row statements of a target over this session''s connection';

-- Referenced tables get smaller ranks; cycles end at a bound, for their constraints have to be deferrable anyway.
CREATE OR REPLACE FUNCTION tbl_repl._rank_sources()
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    WITH RECURSIVE edge AS (
        SELECT DISTINCT c.conrelid AS child, c.confrelid AS parent
        FROM pg_constraint AS c
        WHERE c.contype = 'f' AND c.conrelid <> c.confrelid
    ), walk AS (
        SELECT s.source_table::oid AS rel, 0 AS depth FROM tbl_repl.source AS s
        UNION
        SELECT e.child, w.depth + 1 FROM walk AS w JOIN edge AS e ON e.parent = w.rel WHERE w.depth < 32
    ), rank AS (
        SELECT w.rel, max(w.depth) AS depth FROM walk AS w GROUP BY w.rel
    )
    UPDATE tbl_repl.source AS s SET fk_rank = r.depth
    FROM rank AS r WHERE r.rel = s.source_table AND s.fk_rank <> r.depth
$function$;
COMMENT ON FUNCTION tbl_repl._rank_sources() IS 'orders the replicated tables by their foreign keys';

-- _own_target(target_id, to_drop): the target; 42704 unknown, 42501 not its owner.  to_drop: the owners of the
-- source table and of the extension will do, too, also where the role that defined the target has another name now.
CREATE OR REPLACE FUNCTION tbl_repl._own_target(target_id integer, to_drop boolean DEFAULT false)
RETURNS tbl_repl.target
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target tbl_repl.target%ROWTYPE;
BEGIN
    SELECT * INTO target FROM tbl_repl.target AS t WHERE t.target_id = _own_target.target_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = format('target %s does not exist', coalesce(target_id::text, 'NULL')),
            HINT    = 'See tbl_repl.target_status.';
    ELSIF NOT coalesce(pg_has_role(current_user, to_regrole(quote_ident(target.owner))::oid, 'MEMBER'), false)
          AND NOT (to_drop AND (pg_has_role(current_user, tbl_repl._owner(), 'USAGE')
                                OR EXISTS (SELECT FROM tbl_repl.source AS s JOIN pg_class AS c ON c.oid = s.source_table
                                           WHERE s.source_id = target.source_id AND pg_has_role(current_user, c.relowner, 'USAGE')))) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('must be owner of target %s', target_id),
            DETAIL  = format('It was defined by role %I.', target.owner),
            HINT    = CASE WHEN to_drop THEN 'Let that role, the owner of the table or a superuser drop it.'
                           WHEN to_regrole(quote_ident(target.owner)) IS NULL
                           THEN 'It was renamed or dropped: rename it back, or let the owner of the table or a superuser drop the target.'
                           ELSE 'Let that role call this, or a member of it.' END;
    END IF;
    RETURN target;
END
$function$;
COMMENT ON FUNCTION tbl_repl._own_target(integer, boolean) IS 'a target that the caller may change';

-- alter_target: changes what is given, NULL leaves as it is; row_filter => '' and column_map => '{}' take
-- filter and map away.  Without anything to change it looks at both sides anew and rebuilds what is generated:
-- for columns that were added or altered.  Does not copy: see resync_target.  Locks the source SHARE ROW EXCLUSIVE.
-- Not pinned, as add_target.
CREATE OR REPLACE FUNCTION tbl_repl.alter_target(
    target_id      integer,
    dst_table      text DEFAULT NULL,
    mode           text DEFAULT NULL,
    columns        name[] DEFAULT NULL,
    column_map     jsonb DEFAULT NULL,
    row_filter     text DEFAULT NULL,
    operations     text[] DEFAULT NULL,
    on_conflict    text DEFAULT NULL,
    version_column name DEFAULT NULL,
    forward        text DEFAULT NULL,
    timeout        interval DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
BEGIN
    PERFORM tbl_repl._alter_target(target_id, dst_table, mode, columns, column_map, row_filter, operations, on_conflict,
                                   version_column, forward, timeout, pg_catalog.array_to_string(ARRAY(
                                    SELECT pg_catalog.quote_ident(s) FROM pg_catalog.unnest(pg_catalog.current_schemas(false)) AS s), ', '));
END
$function$;
COMMENT ON FUNCTION tbl_repl.alter_target(integer, text, text, name[], jsonb, text, text[], text, name, text, interval) IS
    'changes the definition of a target; what is not given stays';

CREATE OR REPLACE FUNCTION tbl_repl._alter_target(
    target_id      integer,
    dst_table      text,
    mode           text,
    columns        name[],
    column_map     jsonb,
    row_filter     text,
    operations     text[],
    on_conflict    text,
    version_column name,
    forward        text,
    timeout        interval,
    path           text
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET quote_all_identifiers = off
AS $function$
DECLARE
    target tbl_repl.target%ROWTYPE := tbl_repl._own_target(target_id);
    source tbl_repl.source%ROWTYPE;
    old    tbl_repl.target%ROWTYPE := target;
    parts  text[];
    whole  integer[];
BEGIN
    SELECT * INTO STRICT source FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
    IF NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = source.source_table) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_table',
            MESSAGE = format('the source table of target %s does not exist any more', target_id),
            HINT    = format('End its replication: SELECT tbl_repl.drop_target(%s);', target_id);
    END IF;
    target.mode := coalesce(mode, target.mode);
    target.operations := coalesce(operations, target.operations);
    target.on_conflict := coalesce(on_conflict, target.on_conflict);
    target.forward := coalesce(forward, target.forward);
    target.version_column := coalesce(version_column, target.version_column);
    target.timeout := coalesce(timeout, target.timeout);
    PERFORM tbl_repl._check_words(target.mode, target.operations, target.on_conflict, target.forward,
                                  target.timeout);
    target.columns := coalesce(columns, target.columns);
    target.column_map := nullif(coalesce(column_map, target.column_map), '{}');
    target.row_filter := nullif(btrim(coalesce(row_filter, target.row_filter)), '');
    IF dst_table IS NOT NULL THEN
        parts := tbl_repl._parse_dst_table(dst_table);
        IF cardinality(parts) = 2 THEN
            target.dst_schema := parts[1];
        END IF;
        target.dst_name := parts[cardinality(parts)];
    END IF;
    PERFORM tbl_repl._connect_to_define(target);
    EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', source.source_table);
    source := tbl_repl._follow_keys(source);
    PERFORM tbl_repl._check_only_once(target, source.source_table);
    -- names in an expression that was given before mean what they meant then
    target.map_path := CASE WHEN column_map IS NULL THEN target.map_path ELSE path END;
    target.filter_path := CASE WHEN row_filter IS NULL THEN target.filter_path ELSE path END;
    target := tbl_repl._define(target, source);
    target.generation := tbl_repl._new_generation();
    whole := tbl_repl._truncate_whole(target);
    UPDATE tbl_repl.target AS t
    SET dst_schema = target.dst_schema, dst_name = target.dst_name, mode = target.mode, columns = target.columns,
        column_map = target.column_map, row_filter = target.row_filter, operations = target.operations,
        on_conflict = target.on_conflict, version_column = target.version_column, forward = target.forward,
        timeout = target.timeout, sent_columns = target.sent_columns, sent_exprs = target.sent_exprs,
        filter_expr = target.filter_expr, map_path = target.map_path, filter_path = target.filter_path, dst_keys = target.dst_keys, remote = target.remote, generation = target.generation,
        receipts = target.receipts
    WHERE t.target_id = _alter_target.target_id;
    IF target.on_conflict <> 'overwrite' AND tbl_repl._old_value_sql(old) IS DISTINCT FROM tbl_repl._old_value_sql(target) THEN
        PERFORM tbl_repl._forget_olds(target);
    END IF;
    IF old.mode = 'async' AND target.mode <> 'async' THEN
        PERFORM tbl_repl._leave_async(old);
    END IF;
    PERFORM tbl_repl._note_timeline(target_id);
    PERFORM tbl_repl._forget_tombstones(source.source_id);
    PERFORM tbl_repl._take_over(target);
    PERFORM tbl_repl._rebuild_target(target_id);
    PERFORM tbl_repl._rebuild_capture(source.source_id);
    PERFORM tbl_repl._rebuild_neighbours(target);
    PERFORM tbl_repl._check_truncates(whole);
    PERFORM tbl_repl._prepare_now(target);
    PERFORM tbl_repl._rank_sources();
END
$function$;
COMMENT ON FUNCTION tbl_repl._alter_target(integer, text, text, name[], jsonb, text, text[], text, name, text, interval, text) IS
    'alter_target with the caller''s search_path';

-- Functions of a target that the caller cannot replace: those that a restore without owners has left go, others are told of.
CREATE OR REPLACE FUNCTION tbl_repl._take_over(target tbl_repl.target)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    owner name;
BEGIN
    PERFORM tbl_repl._drop_orphans(target.target_id, target.source_id);
    SELECT pg_get_userbyid(f.proowner) INTO owner
    FROM unnest(tbl_repl._target_functions(target.target_id)) AS s (signature) JOIN pg_proc AS f ON f.oid = to_regprocedure(s.signature)
    WHERE NOT pg_has_role(current_user, f.proowner, 'USAGE');
    IF FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('functions of target %s belong to role %I', target.target_id, owner),
            DETAIL  = 'Only a member of that role can replace them.',
            HINT    = format('SELECT tbl_repl.drop_target(%s); as the owner of the table, and add it anew.', target.target_id);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._take_over(tbl_repl.target) IS
    'sees to it that the caller can replace the functions of a target';

-- Whether a function generated for a target is left from a restore without owners: it belongs to who has restored it.
CREATE OR REPLACE FUNCTION tbl_repl._is_left(target_id integer, function_owner oid)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT EXISTS (SELECT FROM tbl_repl.target AS t JOIN pg_roles AS d ON d.rolname = t.owner JOIN pg_roles AS r ON r.oid = function_owner
                   WHERE t.target_id = _is_left.target_id AND d.oid <> r.oid AND (r.rolsuper OR r.rolname = tbl_repl._owner()))
$function$;
COMMENT ON FUNCTION tbl_repl._is_left(integer, oid) IS
    'whether a generated function belongs to who has restored it, not to who defined its target';

-- _follow_keys(source): the source with the present names of its key columns.  Names come first: numbers mean nothing
-- after a restore.
CREATE OR REPLACE FUNCTION tbl_repl._follow_keys(source tbl_repl.source)
RETURNS tbl_repl.source
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    named   smallint[] := tbl_repl._column_numbers(source.source_table, source.key_columns);
    names   name[];
    numbers smallint[];
BEGIN
    SELECT array_agg(a.attname ORDER BY k.n), array_agg(a.attnum ORDER BY k.n) INTO names, numbers
    FROM unnest(named, source.key_numbers) WITH ORDINALITY AS k (named, was, n)
    JOIN pg_attribute AS a ON a.attrelid = source.source_table AND a.attnum = coalesce(k.named, k.was) AND NOT a.attisdropped;
    IF numbers = source.key_numbers AND names = source.key_columns OR cardinality(names) IS DISTINCT FROM cardinality(named) THEN
        RETURN source;  -- one that was dropped is told of where the key is needed
    END IF;
    PERFORM tbl_repl._find_key(source.source_table, names);
    UPDATE tbl_repl.source AS s SET key_columns = names, key_numbers = numbers
    WHERE s.source_id = _follow_keys.source.source_id RETURNING s.* INTO source;
    RETURN source;
END
$function$;
COMMENT ON FUNCTION tbl_repl._follow_keys(tbl_repl.source) IS 'finds key columns that have been renamed';

-- What capture has kept of old rows meant something under the policy it was kept for: under another one the queued
-- changes are shipped without it, whatever is there.  Nobody writes the table now.
CREATE OR REPLACE FUNCTION tbl_repl._forget_olds(target tbl_repl.target)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    UPDATE tbl_repl.change AS c SET olds = NULL
    WHERE c.source_id = target.source_id AND c.olds IS NOT NULL AND (c.target_id IS NULL OR c.target_id = target.target_id)
      AND NOT EXISTS (SELECT FROM tbl_repl.target AS o
                      WHERE o.source_id = target.source_id AND o.target_id <> target.target_id AND o.on_conflict <> 'overwrite');
    UPDATE tbl_repl.stash AS s SET olds = NULL
    WHERE s.source_id = target.source_id AND s.txid = pg_current_xact_id() AND s.olds IS NOT NULL;
    UPDATE tbl_repl.quarantined AS q SET expected = NULL WHERE q.target_id = target.target_id AND q.expected IS NOT NULL
$function$;
COMMENT ON FUNCTION tbl_repl._forget_olds(tbl_repl.target) IS
    'makes queued changes of a target fit another conflict policy';

-- An async target shares its queue rows with others; a direct one has its own.  Nobody writes the table now.
CREATE OR REPLACE FUNCTION tbl_repl._leave_async(target tbl_repl.target)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    moved bigint;
BEGIN
    EXECUTE format('INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count, captured_at, origin, olds) '
                   'SELECT h.segment, c.source_id, %s, c.op, c.keys, c.row_count, c.captured_at, c.origin, c.olds FROM tbl_repl.queue_head AS h, %s AND c.target_id IS NULL',
                   target.target_id, tbl_repl._pending_from(target, tbl_repl._position(target.target_id)));
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved > 0 THEN
        UPDATE tbl_repl.target_state AS st SET status = 'queueing' WHERE st.target_id = target.target_id AND st.status = 'ok';
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._leave_async(tbl_repl.target) IS
    'gives a target that is no longer async its own queue rows';

-- drop_target: ends the replication; rows on the target stay.  With the last target of a table its
-- triggers go, and the table is as it was.  Who has defined a target needs no right on the table to drop it.
-- Errors: 42704 unknown, 42501.  Locks the source ACCESS EXCLUSIVE.
CREATE OR REPLACE FUNCTION tbl_repl.drop_target(target_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET quote_all_identifiers = off
AS $function$
DECLARE
    target tbl_repl.target%ROWTYPE := tbl_repl._own_target(target_id, true);
    rel    record;
    last   boolean := NOT EXISTS (SELECT FROM tbl_repl.target AS t WHERE t.source_id = target.source_id AND t.target_id <> drop_target.target_id);
BEGIN
    SELECT c.oid::regclass AS id, pg_get_userbyid(c.relowner) AS owner, pg_has_role(current_user, c.relowner, 'USAGE') AS owned,
           (SELECT pg_has_role(current_user, f.proowner, 'USAGE') FROM pg_proc AS f
            WHERE f.pronamespace = 'tbl_repl'::regnamespace AND f.proname = format('capture_%s', s.source_id)) AS captured
    INTO rel
    FROM tbl_repl.source AS s JOIN pg_class AS c ON c.oid = s.source_table WHERE s.source_id = target.source_id;
    -- Writers in flight have ended when this is granted: they may refer to the target.
    IF rel.owned THEN
        PERFORM tbl_repl._lock_to_drop(target, rel.id);
    ELSIF last AND NOT rel.captured AND NOT pg_has_role(current_user, tbl_repl._owner(), 'USAGE') THEN
        -- its owner has dropped another target, and the trigger function is his since then
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('must be owner of table %s to drop its last target', rel.id),
            HINT    = format('Let role %I drop it.', rel.owner);
    ELSE
        PERFORM tbl_repl._wait_for_ship(target);
        IF last THEN
            PERFORM tbl_repl._drop_capture(target.source_id);
        END IF;
    END IF;
    DELETE FROM tbl_repl.target AS t WHERE t.target_id = drop_target.target_id;
    PERFORM tbl_repl._forget_tombstones(target.source_id);
    IF rel.owned AND NOT rel.captured THEN
        -- The function cannot be replaced by this role: it goes, and comes again as his.
        PERFORM tbl_repl._drop_triggers(target.source_id, true);
    END IF;
    PERFORM tbl_repl._drop_orphans(target.target_id, target.source_id);
    DELETE FROM tbl_repl.stash AS s WHERE s.target_id = drop_target.target_id;
    DELETE FROM tbl_repl.shipped AS s WHERE s.target_id = drop_target.target_id;
    IF NOT last THEN
        IF rel.id IS NOT NULL THEN
            PERFORM tbl_repl._rebuild_capture(target.source_id, NOT rel.owned);
        END IF;
        RETURN;
    END IF;
    DELETE FROM tbl_repl.stash AS s WHERE s.source_id = target.source_id AND s.txid = pg_current_xact_id();
    DELETE FROM tbl_repl.change AS c WHERE c.source_id = target.source_id;
    DELETE FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
END
$function$;
COMMENT ON FUNCTION tbl_repl.drop_target(integer) IS 'ends the replication to a target';

-- Locks ship of a target, which turns drainers away, and then its table, to the end of the transaction.  Whoever waits for ship
-- must not wait for long, and who ships holds the table: so ship is given back again and again until the table is free.
-- The mode in which triggers go, at once: several targets may be dropped in one transaction, and who has read the table
-- and then writes it would wait for us, and we for him.  Ends by lock_timeout, if the caller has one (55P03).
CREATE OR REPLACE FUNCTION tbl_repl._lock_to_drop(target tbl_repl.target, source_table regclass)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    old_limit text := current_setting('lock_timeout');
    give_up   timestamptz := (SELECT CASE WHEN s.setting = '0' THEN 'infinity' ELSE clock_timestamp() + make_interval(secs => s.setting::double precision / 1000) END
                              FROM pg_settings AS s WHERE s.name = 'lock_timeout');
BEGIN
    LOOP
        BEGIN
            PERFORM pg_advisory_xact_lock(tbl_repl._lock_ship(), target.target_id);
            PERFORM set_config('lock_timeout', least(1000, ceil(extract(epoch FROM target.timeout) * 200))::text, true);
            EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', source_table);
            PERFORM set_config('lock_timeout', old_limit, true);
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            IF clock_timestamp() > give_up THEN
                RAISE;
            END IF;
        END;
        PERFORM pg_sleep(0.05);
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._lock_to_drop(tbl_repl.target, regclass) IS 'takes the locks of drop_target';

-- Takes ship exclusively, to the end of the transaction; 55P03 if a drainer keeps it for longer than twice the timeout,
-- for whoever writes the table waits as well.
CREATE OR REPLACE FUNCTION tbl_repl._wait_for_ship(target tbl_repl.target)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    old_limit text := current_setting('lock_timeout');
BEGIN
    PERFORM set_config('lock_timeout', (ceil(extract(epoch FROM target.timeout) * 2000))::text, true);
    PERFORM pg_advisory_xact_lock(tbl_repl._lock_ship(), target.target_id);
    PERFORM set_config('lock_timeout', old_limit, true);
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION USING
        ERRCODE = 'lock_not_available',
        MESSAGE = format('target %s is being shipped to', target.target_id),
        HINT    = 'Try again when the batch has ended, or stop the worker meanwhile.';
END
$function$;
COMMENT ON FUNCTION tbl_repl._wait_for_ship(tbl_repl.target) IS 'waits, bounded, until nothing is being shipped to a target';

-- SECURITY DEFINER: they may belong to a role that the owner of the table is no member of.  Anybody may call it, for it
-- drops only what nothing needs: functions of a target that is gone, a trigger function without triggers or targets; and what
-- a restore without owners has left of a target that this transaction has altered, as row security lets its owner only.
CREATE OR REPLACE FUNCTION tbl_repl._drop_orphans(target_id integer, source_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    signature text;
BEGIN
    FOR signature IN
        SELECT u.signature
        FROM unnest(tbl_repl._target_functions(target_id)) AS u (signature) JOIN pg_proc AS f ON f.oid = to_regprocedure(u.signature)
        WHERE NOT EXISTS (SELECT FROM tbl_repl.target AS t WHERE t.target_id = _drop_orphans.target_id)
           OR tbl_repl._is_left(target_id, f.proowner)
              -- ours: no transaction is younger
              AND (SELECT age(t.xmin) <= 0 FROM tbl_repl.target AS t WHERE t.target_id = _drop_orphans.target_id)
    LOOP
        EXECUTE format('DROP FUNCTION %s', signature);
    END LOOP;
    IF NOT EXISTS (SELECT FROM tbl_repl.target AS t WHERE t.source_id = _drop_orphans.source_id)
       OR NOT EXISTS (SELECT FROM pg_trigger AS g JOIN pg_proc AS f ON f.oid = g.tgfoid
                      WHERE f.pronamespace = 'tbl_repl'::regnamespace AND f.proname = format('capture_%s', source_id)) THEN
        PERFORM tbl_repl._drop_capture(source_id);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._drop_orphans(integer, integer) IS
    'drops generated functions that have lost their target or their triggers';

CREATE OR REPLACE FUNCTION tbl_repl.drop_target(
    source_table regclass,
    server       name,
    dst_table    text DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    found_ids integer[];
    parts     text[] := tbl_repl._parse_dst_table(dst_table);
BEGIN
    SELECT array_agg(t.target_id) INTO found_ids
    FROM tbl_repl.target AS t JOIN tbl_repl.source AS s USING (source_id)
    WHERE s.source_table = drop_target.source_table AND t.server = drop_target.server
      AND (dst_table IS NULL OR (t.dst_name = parts[cardinality(parts)] AND (cardinality(parts) = 1 OR t.dst_schema = parts[1])));
    IF coalesce(cardinality(found_ids), 0) <> 1 THEN
        RAISE EXCEPTION USING
            ERRCODE = CASE WHEN found_ids IS NULL THEN 'undefined_object' ELSE 'ambiguous_parameter' END,
            MESSAGE = format(CASE WHEN found_ids IS NULL THEN 'table %s has no such target on server %I'
                                  ELSE 'table %s has several targets on server %I' END, source_table, server),
            HINT    = CASE WHEN found_ids IS NULL THEN 'See tbl_repl.target_status.' ELSE 'Name one in dst_table.' END;
    END IF;
    PERFORM tbl_repl.drop_target(found_ids[1]);
END
$function$;
COMMENT ON FUNCTION tbl_repl.drop_target(regclass, name, text) IS 'ends the replication of a table to a server';

-- pause_target: from now on changes queue, whatever the mode.  Waits for shippers in flight.
CREATE OR REPLACE FUNCTION tbl_repl.pause_target(target_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    PERFORM tbl_repl._own_target(target_id);
    PERFORM pg_advisory_xact_lock(tbl_repl._lock_ship(), target_id);
    UPDATE tbl_repl.target_state AS st SET status = 'paused' WHERE st.target_id = pause_target.target_id;
END
$function$;
COMMENT ON FUNCTION tbl_repl.pause_target(integer) IS 'stops shipping to a target; changes queue';

-- resume_target: what has queued is shipped by replay or the worker, then the target returns to ok.
CREATE OR REPLACE FUNCTION tbl_repl.resume_target(target_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    current_status text;
BEGIN
    PERFORM tbl_repl._own_target(target_id);
    PERFORM pg_advisory_xact_lock(tbl_repl._lock_ship(), target_id);
    SELECT st.status INTO current_status FROM tbl_repl.target_state AS st
    WHERE st.target_id = resume_target.target_id FOR UPDATE;
    IF current_status NOT IN ('paused', 'failed') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('target %s is not paused', target_id),
            DETAIL  = format('Its status is %s.', current_status),
            HINT    = 'Only a target that is paused or failed can be resumed.';
    END IF;
    UPDATE tbl_repl.target_state AS st
    SET status = CASE WHEN st.copy_after IS NOT NULL OR EXISTS (SELECT FROM tbl_repl.piece AS p WHERE p.target_id = st.target_id)
                      THEN 'copying' ELSE 'queueing' END, next_try_at = NULL, failures = 0
    WHERE st.target_id = resume_target.target_id;
    PERFORM tbl_repl._back_to_ok(target_id);
END
$function$;
COMMENT ON FUNCTION tbl_repl.resume_target(integer) IS 'lets a paused or failed target go on';

-- explain_target(target_id, key): the statements that would be sent for a row, without a key for the first one; a
-- template where there is none.  Sends nothing.  The row's values are in it, so it takes the owner of the target.
CREATE OR REPLACE FUNCTION tbl_repl.explain_target(target_id integer, key jsonb DEFAULT NULL)
RETURNS SETOF text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target   tbl_repl.target%ROWTYPE := tbl_repl._own_target(target_id);
    keys     text[];
    rendered record;
BEGIN
    IF key IS NULL THEN
        EXECUTE format('SELECT tbl_repl.page_%s(NULL, 1)', target_id) INTO keys;
    ELSE
        SELECT ARRAY[tbl_repl._key_from_json(s.source_table, s.key_columns, key)] INTO keys
        FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
    END IF;
    IF keys IS NULL THEN
        RETURN QUERY SELECT format('%s($1, ...)%s', p.head, p.tail) FROM tbl_repl._upsert_parts(target) AS p;
        RETURN;
    END IF;
    EXECUTE format('SELECT * FROM tbl_repl.render_%s($1, false, true, ''plain'')', target_id) INTO rendered USING keys;
    RETURN QUERY SELECT x FROM unnest(ARRAY[rendered.deletes, rendered.upserts]) AS x WHERE x IS NOT NULL;
END
$function$;
COMMENT ON FUNCTION tbl_repl.explain_target(integer, jsonb) IS
    'the SQL that would be sent for a row: {"key column": value}; without a key, for the first row';

-- resync_target: queues every row; rows that only the target has stay (see repair_target).
CREATE OR REPLACE FUNCTION tbl_repl.resync_target(target_id integer)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target tbl_repl.target%ROWTYPE := tbl_repl._own_target(target_id);
    after  text;
    page   text[];
    total  bigint := 0;
BEGIN
    LOOP
        EXECUTE format('SELECT tbl_repl.page_%s($1, 10000)', target_id) INTO page USING after;
        EXIT WHEN page IS NULL;
        PERFORM tbl_repl._queue_keys(target, page);
        total := total + cardinality(page);
        after := page[cardinality(page)];
    END LOOP;
    PERFORM tbl_repl._note_timeline(target_id);
    RETURN total;
END
$function$;
COMMENT ON FUNCTION tbl_repl.resync_target(integer) IS 'queues every row of a target; returns how many';

-- Queues keys for one target as if they had been written, and lets everything for it queue behind them.
CREATE OR REPLACE FUNCTION tbl_repl._queue_keys(target tbl_repl.target, keys text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(tbl_repl._lock_queue(), target.target_id);
    INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count)
    SELECT h.segment, target.source_id, target.target_id, o.op, _queue_keys.keys, cardinality(_queue_keys.keys)
    FROM tbl_repl.queue_head AS h,
         -- as an operation that this target takes
         (SELECT CASE WHEN 'delete' = ANY (target.operations) THEN 'D' WHEN 'update' = ANY (target.operations) THEN 'U'
                      WHEN 'insert' = ANY (target.operations) THEN 'I' ELSE 'T' END::"char" AS op) AS o;
    UPDATE tbl_repl.target_state AS st SET status = 'queueing'
    WHERE st.target_id = target.target_id AND st.status = 'ok' AND target.mode <> 'async';
END
$function$;
COMMENT ON FUNCTION tbl_repl._queue_keys(tbl_repl.target, text[]) IS 'queues keys for one target';
