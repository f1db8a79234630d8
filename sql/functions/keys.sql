-- Keys: which columns address a row, how a key is written down, how it is found again.
--
-- A key travels as one text: the column's own text form, or a JSON array of text forms where the key
-- has several columns.  Everything here returns pieces of SQL over a row called s or a key called u.tbl_repl_key (so that no column of the table is meant by accident).

-- Key columns come in index order, because that is the order in which the index compares them.
-- A NOT NULL that is NOT VALID (PostgreSQL 18) sets attnotnull, too, but there may be rows from before.
CREATE OR REPLACE FUNCTION tbl_repl._find_key(source_table regclass, key_columns name[])
RETURNS name[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    found_key name[];
BEGIN
    PERFORM tbl_repl._check_columns(source_table, 'key_columns', key_columns);
    SELECT k.columns INTO found_key
    FROM pg_index AS i
    CROSS JOIN LATERAL (
        SELECT array_agg(a.attname ORDER BY n) AS columns, bool_and(a.attnotnull AND NOT EXISTS (
                   SELECT FROM pg_constraint AS c
                   WHERE c.conrelid = a.attrelid AND c.contype = 'n' AND c.conkey = ARRAY[a.attnum] AND NOT c.convalidated)) AS not_null
        FROM generate_series(0, i.indnkeyatts - 1) AS n
        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[n]
    ) AS k
    WHERE i.indrelid = source_table
      AND i.indisunique AND NOT i.indisexclusion AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
      AND k.not_null
      AND CASE WHEN key_columns IS NULL THEN i.indisprimary
               ELSE k.columns @> key_columns AND k.columns <@ key_columns END
    ORDER BY i.indisprimary DESC, i.indexrelid
    LIMIT 1;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_table_definition',
            MESSAGE = CASE WHEN key_columns IS NULL AND EXISTS (SELECT FROM pg_index AS i WHERE i.indrelid = source_table AND i.indisprimary)
                           THEN format('table %s has no primary key but one WITHOUT OVERLAPS', source_table)
                           WHEN key_columns IS NULL
                           THEN format('table %s has no primary key', source_table)
                           ELSE format('table %s has no unique index on exactly the not-null columns (%s)', source_table,
                                       (SELECT string_agg(quote_ident(c), ', ') FROM unnest(key_columns) AS c)) END,
            DETAIL  = 'A target needs a key to find the row on the other side.',
            HINT    = 'Add a PRIMARY KEY, or name the columns of a unique index on not-null columns in key_columns; a NOT NULL that is NOT VALID does not count.';
    END IF;
    RETURN found_key;
END
$function$;
COMMENT ON FUNCTION tbl_repl._find_key(regclass, name[]) IS
    'the primary key, or the unique index on exactly these columns; 42P16 where there is none';

CREATE OR REPLACE FUNCTION tbl_repl._column_numbers(relation regclass, columns name[])
RETURNS smallint[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT array_agg(a.attnum ORDER BY c.n)
    FROM unnest(columns) WITH ORDINALITY AS c (name, n)
    LEFT JOIN pg_attribute AS a ON a.attrelid = relation AND a.attname = c.name AND a.attnum > 0 AND NOT a.attisdropped
$function$;
COMMENT ON FUNCTION tbl_repl._column_numbers(regclass, name[]) IS 'numbers of columns, NULL for one that does not exist';

CREATE OR REPLACE FUNCTION tbl_repl._check_columns(
    source_table regclass,
    argument     text,
    columns      name[]
)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    unknown name;
BEGIN
    SELECT c INTO unknown
    FROM unnest(columns) AS c
    WHERE NOT EXISTS (SELECT FROM pg_attribute AS a
                      WHERE a.attrelid = source_table AND a.attname = c AND a.attnum > 0 AND NOT a.attisdropped);
    IF FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = CASE WHEN unknown IS NULL THEN 'invalid_parameter_value' ELSE 'undefined_column' END,
            MESSAGE = CASE WHEN unknown IS NULL THEN format('%s contains NULL', argument)
                           ELSE format('column %I of table %s does not exist', unknown, source_table) END,
            HINT    = format('%s names columns of the source table.', argument);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_columns(regclass, text, name[]) IS
    'refuses names that are no columns of the source (42703) and NULL (22023)';

-- Type and operators of each key column, the operators as the index has them: a type like
-- citext is not compared by what a pinned search_path would find.
CREATE OR REPLACE FUNCTION tbl_repl._key_parts(source_table regclass, key_columns name[])
RETURNS TABLE (n integer, name name, type text, type_id oid, equals text, greater text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT u.n::integer, u.name, format_type(a.atttypid, -1), a.atttypid,
           coalesce(op.equals, 'OPERATOR(pg_catalog.=)'), coalesce(op.greater, 'OPERATOR(pg_catalog.>)')
    FROM unnest(key_columns) WITH ORDINALITY AS u (name, n)
    JOIN pg_attribute AS a ON a.attrelid = source_table AND a.attname = u.name
    LEFT JOIN LATERAL (
        SELECT max(format('OPERATOR(%I.%s)', ns.nspname, o.oprname)) FILTER (WHERE ao.amopstrategy = 3) AS equals,
               max(format('OPERATOR(%I.%s)', ns.nspname, o.oprname)) FILTER (WHERE ao.amopstrategy = 5) AS greater
        FROM pg_index AS i
        CROSS JOIN LATERAL generate_series(0, i.indnkeyatts - 1) AS p
        JOIN pg_opclass AS oc ON oc.oid = i.indclass[p]
        JOIN pg_amop AS ao ON ao.amopfamily = oc.opcfamily AND ao.amopstrategy IN (3, 5)
                          AND ao.amoplefttype = oc.opcintype AND ao.amoprighttype = oc.opcintype
        JOIN pg_operator AS o ON o.oid = ao.amopopr
        JOIN pg_namespace AS ns ON ns.oid = o.oprnamespace
        WHERE i.indrelid = source_table AND i.indisunique AND NOT i.indisexclusion AND i.indkey[p] = a.attnum
          -- ORDER BY goes by the default class, whatever the index has
          AND oc.opcdefault
        GROUP BY i.indisprimary, i.indexrelid, p
        ORDER BY i.indisprimary DESC, i.indexrelid
        LIMIT 1) AS op ON true
    ORDER BY u.n
$function$;
COMMENT ON FUNCTION tbl_repl._key_parts(regclass, name[]) IS
    'type and operators of the key columns, in order';

CREATE OR REPLACE FUNCTION tbl_repl._key_text(key_columns name[], row_name text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN cardinality(key_columns) = 1
                THEN format('%s.%I::text', row_name, key_columns[1])
                ELSE format('json_build_array(%s)::text',
                            (SELECT string_agg(format('%s.%I::text', row_name, c), ', ' ORDER BY n)
                             FROM unnest(key_columns) WITH ORDINALITY AS u (c, n))) END
$function$;
COMMENT ON FUNCTION tbl_repl._key_text(name[], text) IS
    'SQL expression: the key of a row as one text';

CREATE OR REPLACE FUNCTION tbl_repl._key_match(source_table regclass, key_columns name[])
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT string_agg(format('s.%I %s (%s)::%s', p.name, p.equals,
                             CASE WHEN cardinality(key_columns) = 1 THEN 'u.tbl_repl_key'
                                  ELSE format('u.tbl_repl_key::json ->> %s', p.n - 1) END, p.type), ' AND ' ORDER BY p.n)
    FROM tbl_repl._key_parts(source_table, key_columns) AS p
$function$;
COMMENT ON FUNCTION tbl_repl._key_match(regclass, name[]) IS
    'SQL condition: row s has the key u.tbl_repl_key';

-- Columns and bounds, both SQL expressions, in key order.  A row comparison where there can be one, for an index can
-- answer it: it takes one operator for all columns.
CREATE OR REPLACE FUNCTION tbl_repl._comes_after(
    columns text[],
    equals  text[],
    greater text[],
    bounds  text[]
)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN greater[1] = ALL (greater)
                THEN format('(%s) %s (%s)', array_to_string(columns, ', '), greater[1], array_to_string(bounds, ', '))
                ELSE (SELECT string_agg(concat_ws(' AND ', (SELECT string_agg(format('%s %s %s', columns[e], equals[e], bounds[e]), ' AND ' ORDER BY e)
                                                            FROM generate_series(1, n - 1) AS e),
                                                  format('%s %s %s', columns[n], greater[n], bounds[n])), ' OR ' ORDER BY n)
                      FROM generate_subscripts(columns, 1) AS n) END
$function$;
COMMENT ON FUNCTION tbl_repl._comes_after(text[], text[], text[], text[]) IS
    'SQL condition: columns come after bounds, by the operators given';

-- Its reverse, also as something that an index can answer.
CREATE OR REPLACE FUNCTION tbl_repl._comes_until(
    columns text[],
    equals  text[],
    greater text[],
    bounds  text[]
)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN 'OPERATOR(pg_catalog.>)' = ALL (greater)
                THEN format('(%s) OPERATOR(pg_catalog.<=) (%s)', array_to_string(columns, ', '), array_to_string(bounds, ', '))
                ELSE format('NOT (%s)', tbl_repl._comes_after(columns, equals, greater, bounds)) END
$function$;
COMMENT ON FUNCTION tbl_repl._comes_until(text[], text[], text[], text[]) IS
    'SQL condition: columns do not come after bounds, by the operators given';

CREATE OR REPLACE FUNCTION tbl_repl._key_after(source_table regclass, key_columns name[], key text DEFAULT '$1')
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT tbl_repl._comes_after(array_agg(format('s.%I', p.name) ORDER BY p.n), array_agg(p.equals ORDER BY p.n), array_agg(p.greater ORDER BY p.n),
                                 array_agg(format('(%s)::%s', CASE WHEN cardinality(key_columns) = 1 THEN key ELSE format('%s::json ->> %s', key, p.n - 1) END, p.type) ORDER BY p.n))
    FROM tbl_repl._key_parts(source_table, key_columns) AS p
$function$;
COMMENT ON FUNCTION tbl_repl._key_after(regclass, name[], text) IS
    'SQL condition: row s comes after a key, given as an expression, in key order';

CREATE OR REPLACE FUNCTION tbl_repl._key_until(source_table regclass, key_columns name[], key text DEFAULT '$2')
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT tbl_repl._comes_until(array_agg(format('s.%I', p.name) ORDER BY p.n), array_agg(p.equals ORDER BY p.n), array_agg(p.greater ORDER BY p.n),
                                 array_agg(format('(%s)::%s', CASE WHEN cardinality(key_columns) = 1 THEN key ELSE format('%s::json ->> %s', key, p.n - 1) END, p.type) ORDER BY p.n))
    FROM tbl_repl._key_parts(source_table, key_columns) AS p
$function$;
COMMENT ON FUNCTION tbl_repl._key_until(regclass, name[], text) IS
    'SQL condition: row s does not come after a key, given as an expression, in key order';

-- SQL expression over a key k.key: what _key_json gives, for many keys of one table.  A key may be older than the present type of its column.
CREATE OR REPLACE FUNCTION tbl_repl._key_json_sql(source_table regclass, key_columns name[])
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT coalesce(format('CASE WHEN k.key IS NOT NULL THEN jsonb_build_object(%s) END', string_agg(format(
               CASE WHEN p.type_id IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)
                    THEN '%1$L, CASE WHEN %2$s ~ ''^-?[0-9]+$'' THEN to_jsonb((%2$s)::numeric) ELSE to_jsonb(%2$s) END'
                    ELSE '%1$L, to_jsonb(%2$s)' END,
               p.name, CASE WHEN cardinality(key_columns) = 1 THEN 'k.key' ELSE format('(k.key::json ->> %s)', p.n - 1) END), ', ' ORDER BY p.n)), 'NULL::jsonb')
    FROM tbl_repl._key_parts(source_table, key_columns) AS p
$function$;
COMMENT ON FUNCTION tbl_repl._key_json_sql(regclass, name[]) IS
    'SQL expression: a key as users read it, {"column": value}';

CREATE OR REPLACE FUNCTION tbl_repl._key_json(source_table regclass, key_columns name[], key text)
RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RETURN (
        SELECT jsonb_object_agg(p.name,
                   -- the inner CASE keeps a planner that knows the value from casting it before it knows the type
                   CASE WHEN p.type_id IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) AND v.value ~ '^-?[0-9]+$'
                        THEN to_jsonb((CASE WHEN p.type_id IS NOT NULL THEN v.value END)::numeric) ELSE to_jsonb(v.value) END)
        FROM tbl_repl._key_parts(source_table, key_columns) AS p
        CROSS JOIN LATERAL (
            SELECT CASE WHEN cardinality(key_columns) = 1 THEN key
                        ELSE key::json ->> (p.n - 1) END AS value) AS v
        WHERE key IS NOT NULL);
END
$function$;
COMMENT ON FUNCTION tbl_repl._key_json(regclass, name[], text) IS
    'a key as users read it: {"column": value}';

-- 1.0 and 1.00 are one key with two texts: a row may be listed twice then, but must be sent once.
CREATE OR REPLACE FUNCTION tbl_repl._has_exact_key(source_table regclass, key_columns name[])
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT bool_and(
        (a.atttypid = ANY ('{int2,int4,int8,oid,text,varchar,name,bool,uuid,date,timestamp,timestamptz,bytea}'::regtype[]::oid[])
         OR EXISTS (SELECT FROM pg_type AS y WHERE y.oid = a.atttypid AND y.typtype = 'e'))
        AND NOT EXISTS (SELECT FROM pg_collation AS l WHERE l.oid = a.attcollation AND NOT l.collisdeterministic))
    FROM pg_attribute AS a
    WHERE a.attrelid = source_table AND a.attname = ANY (key_columns)
$function$;
COMMENT ON FUNCTION tbl_repl._has_exact_key(regclass, name[]) IS
    'whether equal keys always have the same text';

CREATE OR REPLACE FUNCTION tbl_repl._base_type(type_id oid)
RETURNS oid
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    WITH RECURSIVE step AS (
        SELECT y.oid, y.typtype, y.typbasetype FROM pg_type AS y WHERE y.oid = type_id
        UNION ALL
        SELECT y.oid, y.typtype, y.typbasetype FROM step AS s JOIN pg_type AS y ON y.oid = s.typbasetype WHERE s.typtype = 'd'
    )
    SELECT s.oid FROM step AS s WHERE s.typtype <> 'd'
$function$;
COMMENT ON FUNCTION tbl_repl._base_type(oid) IS 'what a domain is made of; other types are that themselves';

-- _check_key_types(target, source, remote_columns): refuses (42P16) keys that are equal on one side and not on the other:
-- two rows here would be one there, or the former form of a key would not be found there.  remote_columns as in _remote_facts.
-- Between different types a value goes by its text: so it has to have one text only, and that text has to be the
-- only one for what it becomes.
CREATE OR REPLACE FUNCTION tbl_repl._check_key_types(
    target         tbl_repl.target,
    source         tbl_repl.source,
    remote_columns jsonb
)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    part record;
BEGIN
    SELECT k.name, k.type, c.name AS dst_name, c.type AS dst_type, l.fuzzy, c.fuzzy AS dst_fuzzy INTO part
    FROM tbl_repl._key_parts(source.source_table, source.key_columns) AS k
    JOIN pg_type AS y ON y.oid = tbl_repl._base_type(k.type_id)
    JOIN jsonb_to_recordset(remote_columns) AS c (name text, type text, base text, category text, fuzzy boolean)
        ON c.name = target.dst_keys[k.n]::text
    CROSS JOIN LATERAL (
        SELECT EXISTS (SELECT FROM pg_attribute AS a JOIN pg_collation AS o ON o.oid = a.attcollation
                       WHERE a.attrelid = source.source_table AND a.attname = k.name AND NOT o.collisdeterministic) AS fuzzy) AS l
    CROSS JOIN LATERAL (
        SELECT CASE
            WHEN y.typname = c.base THEN true
            WHEN c.base IN ('text', 'varchar') OR c.category = 'E'
            THEN NOT l.fuzzy AND (y.typcategory = 'E' OR y.typname = ANY ('{int2,int4,int8,oid,text,varchar,bpchar,name,char,bool,uuid,date,time,timestamp,timestamptz,bytea,inet,cidr,macaddr,macaddr8,bit,varbit,pg_lsn}'))
            -- a number that does not fit is refused there
            WHEN c.base IN ('int2', 'int4', 'int8', 'oid', 'numeric') THEN y.typname IN ('int2', 'int4', 'int8', 'oid', 'numeric')
            WHEN c.base IN ('inet', 'cidr') THEN y.typname = 'cidr'
            WHEN c.base = 'varbit' THEN y.typname = 'bit'
            WHEN c.base IN ('timestamp', 'timestamptz') THEN y.typname IN ('date', 'timestamp', 'timestamptz')
            ELSE false END AS fits) AS t
    WHERE l.fuzzy <> c.fuzzy OR NOT t.fits
    ORDER BY k.n
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_table_definition',
            MESSAGE = CASE WHEN part.fuzzy = part.dst_fuzzy
                           THEN format('key column %I is of type %s, but %I on the target of type %s', part.name, part.type, part.dst_name, part.dst_type)
                           ELSE format('the collation of key column %I is %s, that of %I on the target is not', part.name,
                                       CASE WHEN part.fuzzy THEN 'nondeterministic' ELSE 'deterministic' END, part.dst_name) END,
            DETAIL  = 'Keys that are equal on one side could be different on the other: rows would be lost, or left behind by a key that changes.',
            HINT    = CASE WHEN part.fuzzy = part.dst_fuzzy
                           THEN format('Give the target''s column the type of the source''s, %s, or choose other key_columns.', part.type)
                           ELSE 'Give the target''s column the type and the collation of the source''s, or choose other key_columns.' END;
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_key_types(tbl_repl.target, tbl_repl.source, jsonb) IS
    'refuses a key that is compared in another way on the target';

-- The reverse of _key_json, for what a user types; text forms go through the column's type, so that
-- {"id": "007"} finds the row 7.
CREATE OR REPLACE FUNCTION tbl_repl._key_from_json(source_table regclass, key_columns name[], key jsonb)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO, MDY' SET intervalstyle = 'postgres' SET timezone = 'UTC'
SET extra_float_digits = 1 SET bytea_output = 'hex' SET lc_monetary = 'C' SET array_nulls = on
AS $function$
DECLARE
    missing name;
    forms   text[] := '{}';
    part    record;
    form    text;
BEGIN
    SELECT c INTO missing FROM unnest(key_columns) AS c WHERE key ->> c IS NULL LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('the key has no value for column %I', missing),
            HINT    = format('Give a JSON object with the key columns: %s.',
                             (SELECT jsonb_object_agg(c, '...') FROM unnest(key_columns) AS c));
    END IF;
    FOR part IN SELECT p.* FROM tbl_repl._key_parts(source_table, key_columns) AS p LOOP
        EXECUTE format('SELECT ($1::%s)::text', part.type) INTO form USING key ->> part.name;
        forms := array_append(forms, form);
    END LOOP;
    RETURN CASE WHEN cardinality(forms) = 1 THEN forms[1] ELSE array_to_json(forms)::text END;
END
$function$;
COMMENT ON FUNCTION tbl_repl._key_from_json(regclass, name[], jsonb) IS
    'the key of {"column": value} as one text';

-- A value's text depends on settings of the writer's session.  Pinning costs time in every call, so
-- only what the types need is pinned; types that are not known here (composite, range, domain, array
-- of them, expressions) get everything.
CREATE OR REPLACE FUNCTION tbl_repl._text_settings(types oid[])
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    WITH need AS (
        SELECT CASE
            WHEN t = ANY ('{int2,int4,int8,text,varchar,bpchar,name,bool,numeric,uuid,json,jsonb,oid,inet,cidr,macaddr,bit,varbit,tsvector}'::regtype[]::oid[]) THEN ''
            WHEN t = ANY ('{float4,float8}'::regtype[]::oid[]) THEN 'f'
            WHEN t = ANY ('{date,timestamp}'::regtype[]::oid[]) THEN 'd'
            WHEN t = 'timestamptz'::regtype THEN 'dz'
            WHEN t = 'interval'::regtype THEN 'i'
            WHEN t = 'bytea'::regtype THEN 'b'
            WHEN t = 'money'::regtype THEN 'm'
            WHEN EXISTS (SELECT FROM pg_type AS y WHERE y.oid = t AND y.typtype = 'e') THEN ''
            WHEN t = 0 THEN 'fdzibmat'
            ELSE 'fdzibma' END AS letters
        FROM unnest(types) AS t
    ), letters AS (SELECT string_agg(letters, '') AS l FROM need)
    SELECT concat_ws(E'\n',
        CASE WHEN l ~ 'd' THEN 'SET datestyle = ''ISO, MDY''' END,
        CASE WHEN l ~ 'z' THEN 'SET timezone = ''UTC''' END,
        CASE WHEN l ~ 'i' THEN 'SET intervalstyle = ''postgres''' END,
        CASE WHEN l ~ 'f' THEN 'SET extra_float_digits = 1' END,
        CASE WHEN l ~ 'b' THEN 'SET bytea_output = ''hex''' END,
        CASE WHEN l ~ 'm' THEN 'SET lc_monetary = ''C''' END,
        CASE WHEN l ~ 'a' THEN 'SET array_nulls = on' END,
        CASE WHEN l ~ 't' THEN format('SET default_text_search_config = %L',
                                      (SELECT g.reset_val FROM pg_settings AS g WHERE g.name = 'default_text_search_config')) END)
    FROM letters
$function$;
COMMENT ON FUNCTION tbl_repl._text_settings(oid[]) IS
    'SET clauses under which values of these types have one text form';

-- _sent_types(target, source_table): the type of each expression that is sent, in order; 0, which stands for any type, where
-- it is more than a column.
CREATE OR REPLACE FUNCTION tbl_repl._sent_types(target tbl_repl.target, source_table regclass)
RETURNS oid[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT array_agg(coalesce(a.atttypid, 0) ORDER BY e.n)
    FROM unnest(target.sent_exprs) WITH ORDINALITY AS e (expression, n)
    LEFT JOIN pg_attribute AS a ON a.attrelid = source_table AND a.attnum > 0 AND NOT a.attisdropped
                               AND e.expression = format('s.%I', a.attname)
$function$;
COMMENT ON FUNCTION tbl_repl._sent_types(tbl_repl.target, regclass) IS 'types of the expressions that are sent, 0 for any';

-- Who writes, ships or compares must not decide by his settings which rows a filter wants.
CREATE OR REPLACE FUNCTION tbl_repl._with_filter(types oid[], target tbl_repl.target)
RETURNS oid[]
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN target.filter_is_immutable THEN types ELSE array_append(types, 0::oid) END
$function$;
COMMENT ON FUNCTION tbl_repl._with_filter(oid[], tbl_repl.target) IS 'types whose settings are pinned, and those that the filter of a target may need';

-- What is generated for a target knows the types of the columns: which settings their text needs, and what a key is cast to.
-- One that has another type since then has to be an error, not another value: these calls fail to resolve (42883) as soon as
-- the statement is planned anew, and cost nothing else, for they are inlined.
CREATE OR REPLACE FUNCTION tbl_repl._is_integer(value bigint) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN true;
COMMENT ON FUNCTION tbl_repl._is_integer(bigint) IS 'resolves only for integers of any size';

CREATE OR REPLACE FUNCTION tbl_repl._is_text(value text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN true;
COMMENT ON FUNCTION tbl_repl._is_text(text) IS 'resolves only for text, varchar and char';

-- Not pinned, or it would not be inlined; it names nothing.
CREATE OR REPLACE FUNCTION tbl_repl._is_type(value anyelement, type anyelement)
RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $function$
    SELECT true
$function$;
COMMENT ON FUNCTION tbl_repl._is_type(anyelement, anyelement) IS 'resolves only for values of one type';

CREATE OR REPLACE FUNCTION tbl_repl._same_types(source_table regclass, columns name[])
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT coalesce(string_agg(CASE WHEN a.atttypid = ANY ('{int2,int4,int8}'::regtype[]::oid[]) THEN format('tbl_repl._is_integer(s.%I)', a.attname)
                           WHEN a.atttypid = ANY ('{text,varchar}'::regtype[]::oid[]) THEN format('tbl_repl._is_text(s.%I)', a.attname)
                           ELSE format('tbl_repl._is_type(s.%I, NULL::%s)', a.attname, format_type(a.atttypid, -1)) END, ' AND ' ORDER BY a.attnum), 'true')
    FROM pg_attribute AS a
    WHERE a.attrelid = source_table AND a.attnum > 0 AND NOT a.attisdropped AND a.attname = ANY (columns)
      -- types of users may get another name or schema, and not everybody may name them; their text is under all settings anyway
      AND a.atttypid < 16384
$function$;
COMMENT ON FUNCTION tbl_repl._same_types(regclass, name[]) IS
    'SQL condition: these columns of row s have the built-in types that they have now';

-- _row_match(target, source): which row s a target is sent for a key.
CREATE OR REPLACE FUNCTION tbl_repl._row_match(target tbl_repl.target, source tbl_repl.source)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT concat_ws(' AND ', tbl_repl._key_match(source.source_table, source.key_columns), tbl_repl._sent_as_known(target, source))
$function$;
COMMENT ON FUNCTION tbl_repl._row_match(tbl_repl.target, tbl_repl.source) IS
    'SQL condition: row s has the key u.tbl_repl_key, and columns of the types that are known';

CREATE OR REPLACE FUNCTION tbl_repl._sent_as_known(target tbl_repl.target, source tbl_repl.source)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT tbl_repl._same_types(source.source_table, source.key_columns || ARRAY(
        SELECT a.attname FROM pg_attribute AS a
        WHERE a.attrelid = source.source_table AND a.attnum > 0 AND NOT a.attisdropped AND format('s.%I', a.attname) = ANY (target.sent_exprs)))
$function$;
COMMENT ON FUNCTION tbl_repl._sent_as_known(tbl_repl.target, tbl_repl.source) IS
    'SQL condition: the columns of row s that are sent have the types that they have now';

-- Identity columns GENERATED ALWAYS outside the key cannot be updated: the row has to be inserted anew.
CREATE OR REPLACE FUNCTION tbl_repl._always_columns(target tbl_repl.target)
RETURNS name[]
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT coalesce(array_agg((c ->> 'name')::name), '{}')
    FROM jsonb_array_elements(target.remote -> 'columns') AS c
    WHERE c ->> 'identity' = 'a' AND c ->> 'name' = ANY (target.sent_columns::text[]) AND c ->> 'name' <> ALL (target.dst_keys::text[])
$function$;
COMMENT ON FUNCTION tbl_repl._always_columns(tbl_repl.target) IS
    'columns of the target''s table that are sent and cannot be updated';

-- For sessions that carry rows of any types: all of these, and what shapes how literals are read.  scope: SESSION or LOCAL.
CREATE OR REPLACE FUNCTION tbl_repl._text_session(scope text DEFAULT 'SESSION')
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT string_agg(format('SET %s %s = %L', scope, s.name, s.value), '; ')
    FROM (VALUES ('datestyle', 'ISO, MDY'), ('timezone', 'UTC'), ('intervalstyle', 'postgres'), ('extra_float_digits', '1'),
                 ('bytea_output', 'hex'), ('lc_monetary', 'C'), ('array_nulls', 'on'), ('xmloption', 'content'),
                 ('standard_conforming_strings', 'on')) AS s (name, value)
$function$;
COMMENT ON FUNCTION tbl_repl._text_session(text) IS
    'statements after which a session reads and writes every value in one text form';

-- A literal with a backslash means something else while the writer's session has standard_conforming_strings off.
CREATE OR REPLACE FUNCTION tbl_repl._literal_setting(body text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN strpos(body, chr(92)) > 0 THEN E'\nSET standard_conforming_strings = on' ELSE '' END
$function$;
COMMENT ON FUNCTION tbl_repl._literal_setting(text) IS
    'SET clause that a generated function needs so that its literals mean the same in every session';
