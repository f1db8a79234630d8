-- Guard: tables that only tbl_repl writes.
--
-- Promises that INSERT, UPDATE, DELETE, TRUNCATE, and what is made of them (COPY, MERGE, foreign key
-- cascades), fail with 25006 unless they come over a connection of tbl_repl; also where a partition is
-- named.  The guard is text first (_guard_sql), the same for both ways: protect runs it here,
-- protect_target on the target, where it needs no extension.  It keeps mistakes away, not a table's owner:
-- who owns a table can drop its triggers, and DDL is not looked at.

-- protect(dst_table, replicator): guards a table of this database; again, it changes the replicator and
-- takes in new partitions.  Locks the table SHARE ROW EXCLUSIVE.
-- Errors: 42501 not the owner, 42809 not a table, 42704 no such role, 55000 guarded through its parent.
CREATE OR REPLACE FUNCTION tbl_repl.protect(dst_table regclass, replicator regrole DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    role_name name;
BEGIN
    IF replicator IS NOT NULL THEN
        SELECT r.rolname INTO role_name FROM pg_roles AS r WHERE r.oid = replicator;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING
                ERRCODE = 'undefined_object',
                MESSAGE = format('role %s does not exist', replicator),
                HINT    = 'Name the role as which tbl_repl logs in here: the user of the user mapping on the source.';
        END IF;
    END IF;
    EXECUTE tbl_repl._guard_sql(tbl_repl._local_guard(dst_table), 'tbl_repl', '_refuse_write', role_name);
END
$function$;
COMMENT ON FUNCTION tbl_repl.protect(regclass, regrole) IS
    'makes a table of this database read-only for everybody but tbl_repl, or only those of its connections that log in as a member of replicator';

CREATE OR REPLACE FUNCTION tbl_repl.unprotect(dst_table regclass)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    statement text := tbl_repl._unguard_sql(tbl_repl._local_guard(dst_table));
BEGIN
    IF statement IS NULL THEN
        RAISE NOTICE 'table % is not guarded', dst_table;
    ELSE
        EXECUTE statement;
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl.unprotect(regclass) IS 'takes the guard of a table away';

-- protect_target(target_id): guards the target's table from here, through the target's connection.  Takes
-- effect there at once, and stays if the transaction here is rolled back.  A guard that is there already
-- keeps its function and its replicator.
-- Errors: as protect, and 42501 where the mapped role may not create functions in the table's schema; 08*.
CREATE OR REPLACE FUNCTION tbl_repl.protect_target(target_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target tbl_repl.target%ROWTYPE := tbl_repl._own_target(target_id);
    conn   text := tbl_repl._target_connection(target);
    facts  jsonb := tbl_repl._remote_guard(target, conn);
BEGIN
    IF facts ->> 'function_name' IS NULL AND NOT (facts ->> 'may_create')::boolean THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role %s may not create functions in schema %I on the target', facts ->> 'user', target.dst_schema),
            DETAIL  = 'The guard is a trigger function beside the table.',
            HINT    = format('There: GRANT CREATE ON SCHEMA %I TO %I; or, with the extension there, call tbl_repl.protect there.',
                             target.dst_schema, facts ->> 'user');
    END IF;
    PERFORM tbl_repl._call(conn, tbl_repl._guard_sql(facts,
        coalesce(facts ->> 'function_schema', target.dst_schema),
        coalesce(facts ->> 'function_name', format('_tbl_repl_guard_%s', left(md5(format('%s %s', tbl_repl.node_name(), target_id)), 12))),
        facts ->> 'replicator'), clock_timestamp() + target.timeout);
END
$function$;
COMMENT ON FUNCTION tbl_repl.protect_target(integer) IS
    'makes the table of a target read-only for everybody but tbl_repl; needs no extension there';

CREATE OR REPLACE FUNCTION tbl_repl.unprotect_target(target_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target    tbl_repl.target%ROWTYPE := tbl_repl._own_target(target_id);
    conn      text := tbl_repl._target_connection(target);
    statement text := tbl_repl._unguard_sql(tbl_repl._remote_guard(target, conn));
BEGIN
    IF statement IS NULL THEN
        RAISE NOTICE 'table % on the target is not guarded', tbl_repl._dst_table(target);
    ELSE
        PERFORM tbl_repl._call(conn, statement, clock_timestamp() + target.timeout);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl.unprotect_target(integer) IS 'takes the guard of a target''s table away';

-- The trigger function of protect; protect_target sends its body.  Argument: the replicator, if there is one.
-- A role that was dropped or renamed meanwhile lets nobody through.
CREATE OR REPLACE FUNCTION tbl_repl._refuse_write()
RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF NOT starts_with(current_setting('application_name'), 'tbl_repl') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'read_only_sql_transaction',
            MESSAGE = format('table %s is read-only here', TG_RELID::regclass),
            DETAIL  = 'Its rows are replicated by tbl_repl, which alone may write it.',
            HINT    = 'Write the table on its source, or remove the guard: tbl_repl.unprotect here, tbl_repl.unprotect_target there.';
    ELSIF TG_NARGS > 0 AND NOT EXISTS (SELECT FROM pg_roles AS r
                                       WHERE r.rolname = TG_ARGV[0] AND pg_has_role(session_user, r.oid, 'MEMBER')) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'read_only_sql_transaction',
            MESSAGE = format('table %s is read-only for role %I', TG_RELID::regclass, session_user),
            DETAIL  = format('Only members of role %I write it, by tbl_repl.', TG_ARGV[0]),
            HINT    = 'If tbl_repl logs in as another role now, name that one: SELECT tbl_repl.protect(table, role).';
    END IF;
    IF TG_LEVEL = 'STATEMENT' THEN
        RETURN NULL;
    ELSIF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END
$function$;
COMMENT ON FUNCTION tbl_repl._refuse_write() IS
    'refuses what does not come from tbl_repl; trigger function of guarded tables';

-- _guard_facts_sql(schema, name): query, for either side, that says what a guard has to know of a table:
-- kind, owned, user, may_create, by_row, leaves, through (the partitioned table whose guard it shares),
-- function_schema, function_name, replicator and triggers of the guard it has.
-- DETACH leaves its trigger for TRUNCATE on the former partition; such a one, with nothing guarded above it, belongs to
-- no guard any more, and goes with the first that has its function.
CREATE OR REPLACE FUNCTION tbl_repl._guard_facts_sql(schema name, name name)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format($query$
        WITH tree AS (
            SELECT c.oid, p.relid, p.isleaf
            FROM pg_catalog.pg_class AS c
            JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
            CROSS JOIN LATERAL (SELECT c.oid::regclass AS relid, false AS isleaf
                                UNION ALL
                                SELECT t.relid, t.isleaf FROM pg_catalog.pg_partition_tree(c.oid) AS t WHERE t.relid <> c.oid) AS p
            WHERE n.nspname = %L AND c.relname = %L
        ), guard AS (
            SELECT g.*, tree.oid AS root, pg_catalog.format('%%I.%%I', n.nspname, c.relname) AS table_name
            FROM tree
            JOIN pg_catalog.pg_trigger AS g ON g.tgrelid = tree.relid AND g.tgname IN ('_tbl_repl_guard', '_tbl_repl_guard_row')
            JOIN pg_catalog.pg_class AS c ON c.oid = g.tgrelid
            JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
        ), left_over AS (
            SELECT g.oid, g.tgname, pg_catalog.format('%%I.%%I', n.nspname, c.relname) AS table_name
            FROM pg_catalog.pg_trigger AS g
            JOIN pg_catalog.pg_class AS c ON c.oid = g.tgrelid
            JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
            WHERE g.tgfoid IN (SELECT guard.tgfoid FROM guard) AND g.tgname = '_tbl_repl_guard' AND g.tgtype & 62 = 34  -- BEFORE TRUNCATE and nothing else
              AND g.tgrelid NOT IN (SELECT tree.relid FROM tree)
              AND pg_catalog.pg_has_role(current_user, c.relowner, 'USAGE')
              AND NOT EXISTS (SELECT FROM pg_catalog.pg_partition_ancestors(g.tgrelid) AS a
                              JOIN pg_catalog.pg_trigger AS above ON above.tgrelid = a.relid AND above.tgfoid = g.tgfoid AND above.tgtype & 4 <> 0)
        )
        SELECT pg_catalog.jsonb_build_object(
            'table', pg_catalog.format('%%I.%%I', n.nspname, c.relname),
            'kind', c.relkind,
            'user', current_user,
            'owned', pg_catalog.pg_has_role(current_user, c.relowner, 'USAGE'),
            'may_create', pg_catalog.has_schema_privilege(n.oid, 'CREATE'),
            'by_row', c.relkind = 'p' OR EXISTS (SELECT FROM pg_catalog.pg_inherits AS i WHERE i.inhrelid = c.oid),
            'leaves', (SELECT pg_catalog.jsonb_agg(pg_catalog.format('%%I.%%I', ln.nspname, l.relname) ORDER BY ln.nspname, l.relname)
                       FROM tree JOIN pg_catalog.pg_class AS l ON l.oid = tree.relid JOIN pg_catalog.pg_namespace AS ln ON ln.oid = l.relnamespace
                       WHERE tree.isleaf),
            'through', (SELECT pg_catalog.format('%%I.%%I', tn.nspname, t.relname)
                        FROM guard JOIN pg_catalog.pg_trigger AS above ON above.oid = guard.tgparentid
                        JOIN pg_catalog.pg_class AS t ON t.oid = above.tgrelid JOIN pg_catalog.pg_namespace AS tn ON tn.oid = t.relnamespace
                        WHERE guard.tgrelid = guard.root),
            'function_schema', f.nspname,
            'function_name', f.proname,
            'function_alone', NOT EXISTS (SELECT FROM pg_catalog.pg_trigger AS other
                                          WHERE other.tgfoid = f.oid AND other.tgrelid NOT IN (SELECT tree.relid FROM tree)
                                            AND other.oid NOT IN (SELECT left_over.oid FROM left_over)),
            'replicator', f.replicator,
            'triggers', (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_array(g.tgname, g.table_name) ORDER BY g.table_name, g.tgname)
                         FROM (SELECT guard.tgname, guard.table_name FROM guard WHERE guard.tgparentid = 0
                               UNION ALL SELECT left_over.tgname, left_over.table_name FROM left_over) AS g))
        FROM pg_catalog.pg_class AS c
        JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
        LEFT JOIN LATERAL (
            SELECT p.oid, p.proname, pn.nspname,
                   CASE WHEN guard.tgnargs = 1
                        THEN pg_catalog.convert_from(pg_catalog.substr(guard.tgargs, 1, pg_catalog.length(guard.tgargs) - 1),
                                                     pg_catalog.getdatabaseencoding()) END AS replicator
            FROM guard JOIN pg_catalog.pg_proc AS p ON p.oid = guard.tgfoid JOIN pg_catalog.pg_namespace AS pn ON pn.oid = p.pronamespace
            ORDER BY (guard.tgrelid = c.oid) DESC, guard.tgname
            LIMIT 1) AS f ON true
        WHERE n.nspname = %L AND c.relname = %L$query$, schema, name, schema, name)
$function$;
COMMENT ON FUNCTION tbl_repl._guard_facts_sql(name, name) IS
    'query that says what a guard has to know of a table';

-- _guard_sql(facts, function_schema, function_name, replicator): the guard as text.
-- A statement trigger refuses every statement that names the table.  Statements that name a partition, or
-- the parent of a guarded one, do not fire it: there a row trigger does, which PostgreSQL clones to every
-- partition there is and will be; and a trigger on each leaf for TRUNCATE, which has no rows.
CREATE OR REPLACE FUNCTION tbl_repl._guard_sql(
    facts           jsonb,
    function_schema name,
    function_name   name,
    replicator      name
)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    WITH wanted AS (
        SELECT 1 AS n, facts ->> 'table' AS table_name, '_tbl_repl_guard' AS name,
               'INSERT OR UPDATE OR DELETE OR TRUNCATE' AS events, 'STATEMENT' AS level
        UNION ALL
        SELECT 2, facts ->> 'table', '_tbl_repl_guard_row', 'INSERT OR UPDATE OR DELETE', 'ROW'
        WHERE (facts ->> 'by_row')::boolean
        UNION ALL
        SELECT 3, l, '_tbl_repl_guard', 'TRUNCATE', 'STATEMENT'
        FROM jsonb_array_elements_text(CASE jsonb_typeof(facts -> 'leaves') WHEN 'array' THEN facts -> 'leaves' ELSE '[]' END) AS l
    )
    SELECT concat_ws('; ',
        CASE WHEN function_schema <> 'tbl_repl'
             THEN format('CREATE OR REPLACE FUNCTION %1$I.%2$I() RETURNS trigger LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS %3$L; '
                         'COMMENT ON FUNCTION %1$I.%2$I() IS %4$L; REVOKE ALL ON FUNCTION %1$I.%2$I() FROM PUBLIC',
                         function_schema, function_name,
                         (SELECT p.prosrc FROM pg_proc AS p WHERE p.oid = 'tbl_repl._refuse_write()'::regprocedure),
                         obj_description('tbl_repl._refuse_write()'::regprocedure, 'pg_proc')) END,
        (SELECT string_agg(format('CREATE OR REPLACE TRIGGER %I BEFORE %s ON %s FOR EACH %s EXECUTE FUNCTION %I.%I(%s)',
                                  t.name, t.events, t.table_name, t.level, function_schema, function_name, quote_literal(replicator)),
                           '; ' ORDER BY t.n, t.table_name)
         FROM wanted AS t))
$function$;
COMMENT ON FUNCTION tbl_repl._guard_sql(jsonb, name, name, name) IS 'the statements that guard a table';

-- NULL where there is no guard.  The function goes with its last trigger; that of the extension stays.
CREATE OR REPLACE FUNCTION tbl_repl._unguard_sql(facts jsonb)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT concat_ws('; ', string_agg(format('DROP TRIGGER %I ON %s', g ->> 0, g ->> 1), '; ' ORDER BY n),
                     CASE WHEN starts_with(facts ->> 'function_name', '_tbl_repl_guard_') AND (facts ->> 'function_alone')::boolean
                          THEN format('DROP FUNCTION %I.%I()', facts ->> 'function_schema', facts ->> 'function_name') END)
    FROM jsonb_array_elements(CASE jsonb_typeof(facts -> 'triggers') WHEN 'array' THEN facts -> 'triggers' ELSE '[]' END) WITH ORDINALITY AS t (g, n)
    HAVING count(*) > 0
$function$;
COMMENT ON FUNCTION tbl_repl._unguard_sql(jsonb) IS 'the statements that take a guard away';

CREATE OR REPLACE FUNCTION tbl_repl._check_guardable(facts jsonb)
RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF facts ->> 'kind' NOT IN ('r', 'p') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = format('%s cannot be guarded', facts ->> 'table'),
            DETAIL  = 'Only ordinary and partitioned tables can.';
    ELSIF NOT (facts ->> 'owned')::boolean THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('must be owner of table %s', facts ->> 'table'),
            DETAIL  = format('The guard is put there as role %I.', facts ->> 'user'),
            HINT    = 'Let the owner of the table call this, or make the role a member of the owner.';
    ELSIF facts ->> 'through' IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('table %s is guarded as a partition of %s', facts ->> 'table', facts ->> 'through'),
            HINT    = format('Protect or unprotect %s.', facts ->> 'through');
    END IF;
    RETURN facts;
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_guardable(jsonb) IS 'refuses what cannot be guarded, or not by this role';

CREATE OR REPLACE FUNCTION tbl_repl._local_guard(dst_table regclass)
RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    facts jsonb;
BEGIN
    IF dst_table IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'dst_table must be given';
    END IF;
    EXECUTE (SELECT tbl_repl._guard_facts_sql(n.nspname, c.relname)
             FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = dst_table)
    INTO facts;
    RETURN tbl_repl._check_guardable(facts);
END
$function$;
COMMENT ON FUNCTION tbl_repl._local_guard(regclass) IS 'what a guard has to know of a table of this database';

CREATE OR REPLACE FUNCTION tbl_repl._remote_guard(target tbl_repl.target, conn text)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    facts jsonb := tbl_repl._call(conn, tbl_repl._guard_facts_sql(target.dst_schema, target.dst_name), clock_timestamp() + target.timeout);
BEGIN
    IF facts IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_table',
            MESSAGE = format('table %s does not exist on the target', tbl_repl._dst_table(target)),
            HINT    = format('Create it there, or see tbl_repl.alter_target(%s, dst_table => ...).', target.target_id);
    END IF;
    RETURN tbl_repl._check_guardable(facts);
END
$function$;
COMMENT ON FUNCTION tbl_repl._remote_guard(tbl_repl.target, text) IS 'what a guard has to know of a target''s table';

-- For the verbs that talk to a target outside of shipping: its connection, open; 42704 without server.
CREATE OR REPLACE FUNCTION tbl_repl._target_connection(target tbl_repl.target)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    conn text := tbl_repl._connection_name(target.server, target.owner, target.timeout);
BEGIN
    IF conn IS NULL OR to_regrole(quote_ident(target.owner)) IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = format('server %I or role %I does not exist', target.server, target.owner),
            HINT    = format('Create it again, or drop the target: SELECT tbl_repl.drop_target(%s).', target.target_id);
    END IF;
    PERFORM tbl_repl._connect_alive(target.target_id, conn, clock_timestamp() + target.timeout * 2);
    RETURN conn;
END
$function$;
COMMENT ON FUNCTION tbl_repl._target_connection(tbl_repl.target) IS 'name of the open connection to a target';
