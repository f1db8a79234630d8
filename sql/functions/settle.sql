-- Settle: values that arrive from another node, against what is here.  Runs on the target.
--
-- Promises that each conflict is settled by the target's policy, row by row, and noted; that many values that meet nothing
-- are written by one statement; and that rows are locked before tombstones.  Why newest converges: see conflict.sql.

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
EXCEPTION WHEN foreign_key_violation OR restrict_violation THEN
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
            EXCEPTION WHEN unique_violation OR exclusion_violation OR foreign_key_violation OR restrict_violation THEN
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
