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
    PERFORM tbl_repl._note_followed(target);
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

-- A table that is created later may refer to one that has its target already.
CREATE OR REPLACE FUNCTION tbl_repl._note_followed(target tbl_repl.target)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    UPDATE tbl_repl.target AS o SET cascades = true
    WHERE o.server = target.server AND NOT o.cascades
      AND target.remote -> 'follows' @> jsonb_build_array(jsonb_build_object('schema', o.dst_schema, 'name', o.dst_name))
$function$;
COMMENT ON FUNCTION tbl_repl._note_followed(tbl_repl.target) IS
    'notes that deletions from tables to which that of the target refers take rows along';

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
    old    tbl_repl.target%ROWTYPE;
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
    target.timeout := coalesce(timeout, target.timeout);
    PERFORM tbl_repl._check_words(coalesce(mode, target.mode), coalesce(operations, target.operations), coalesce(on_conflict, target.on_conflict),
                                  coalesce(forward, target.forward), target.timeout);
    PERFORM tbl_repl._connect_to_define(target);
    EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', source.source_table);
    -- somebody else may have altered or dropped it while we waited
    target := tbl_repl._own_target(target_id);
    old := target;
    SELECT * INTO STRICT source FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
    target.mode := coalesce(mode, target.mode);
    target.operations := coalesce(operations, target.operations);
    target.on_conflict := coalesce(on_conflict, target.on_conflict);
    target.forward := coalesce(forward, target.forward);
    target.version_column := coalesce(version_column, target.version_column);
    target.timeout := coalesce(timeout, target.timeout);
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
        filter_expr = target.filter_expr, filter_is_immutable = target.filter_is_immutable, map_path = target.map_path, filter_path = target.filter_path, dst_keys = target.dst_keys, remote = target.remote, generation = target.generation,
        receipts = target.receipts, cascades = target.cascades
    WHERE t.target_id = _alter_target.target_id;
    IF target.on_conflict <> 'overwrite' AND tbl_repl._old_value_sql(old) IS DISTINCT FROM tbl_repl._old_value_sql(target) THEN
        PERFORM tbl_repl._forget_olds(target);
    END IF;
    IF old.mode = 'async' AND target.mode <> 'async' THEN
        PERFORM tbl_repl._leave_async(old);
    ELSIF old.mode <> 'async' AND target.mode = 'async' THEN
        PERFORM tbl_repl._become_async(target);
    END IF;
    PERFORM tbl_repl._forget_tombstones(source.source_id);
    PERFORM tbl_repl._take_over(target);
    PERFORM tbl_repl._rebuild_target(target_id);
    PERFORM tbl_repl._rebuild_capture(source.source_id);
    PERFORM tbl_repl._rebuild_neighbours(target);
    PERFORM tbl_repl._check_truncates(whole);
    PERFORM tbl_repl._prepare_now(target);
    PERFORM tbl_repl._note_followed(target);
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

-- What this transaction has written for a direct target is not shipped at its commit any more.
CREATE OR REPLACE FUNCTION tbl_repl._become_async(target tbl_repl.target)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT tbl_repl._unpack(f) FROM tbl_repl.flush AS f WHERE f.txid = pg_current_xact_id() AND f.target_id = target.target_id;
    INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count, olds)
    SELECT h.segment, s.source_id, target.target_id, s.op, s.keys, s.row_count, s.olds
    FROM tbl_repl.queue_head AS h, tbl_repl.stash AS s
    WHERE s.txid = pg_current_xact_id() AND s.source_id = target.source_id AND s.op NOT IN ('C', 'W', 'N')
$function$;
COMMENT ON FUNCTION tbl_repl._become_async(tbl_repl.target) IS 'queues what this transaction has written for a target that was direct';

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
    last   boolean := tbl_repl._is_last(target);
BEGIN
    SELECT c.oid::regclass AS id, pg_get_userbyid(c.relowner) AS owner, pg_has_role(current_user, c.relowner, 'USAGE') AS owned,
           (SELECT pg_has_role(current_user, f.proowner, 'USAGE') FROM pg_proc AS f
            WHERE f.pronamespace = 'tbl_repl'::regnamespace AND f.proname = format('capture_%s', s.source_id)) AS captured
    INTO rel
    FROM tbl_repl.source AS s JOIN pg_class AS c ON c.oid = s.source_table WHERE s.source_id = target.source_id;
    -- Writers in flight have ended when this is granted: they may refer to the target.
    IF rel.owned THEN
        PERFORM tbl_repl._lock_to_drop(target, rel.id);
        last := tbl_repl._is_last(target);  -- another one may have gone while we waited
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

CREATE OR REPLACE FUNCTION tbl_repl._is_last(target tbl_repl.target)
RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT NOT EXISTS (SELECT FROM tbl_repl.target AS t WHERE t.source_id = target.source_id AND t.target_id <> target.target_id)
$function$;
COMMENT ON FUNCTION tbl_repl._is_last(tbl_repl.target) IS 'whether a table has no other target, as of now';

-- Locks ship of a target, which turns drainers away, and then its table, to the end of the transaction.  Whoever waits for ship
-- must not wait for long, and who ships holds the table: so ship is given back again and again until the table is free.  While
-- we wait for those who use the table all others wait behind us: a tenth of a second at first; in vain where several use it in
-- turns, so it grows, up to less than a second, the time after which PostgreSQL looks for deadlocks.  In between all go on.
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
    failures  integer := 0;
BEGIN
    LOOP
        BEGIN
            PERFORM pg_advisory_xact_lock(tbl_repl._lock_ship(), target.target_id);
            PERFORM set_config('lock_timeout', least(100 * 2 ^ least(failures / 5, 4), 900)::text, true);
            EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', source_table);
            PERFORM set_config('lock_timeout', old_limit, true);
            RETURN;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            IF clock_timestamp() > give_up THEN
                RAISE;
            END IF;
        END;
        failures := failures + 1;
        PERFORM pg_sleep(0.4);
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
    IF source_table IS NULL OR server IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'source_table and server must be given';
    END IF;
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
    RETURN total;
END
$function$;
COMMENT ON FUNCTION tbl_repl.resync_target(integer) IS 'queues every row of a target; returns how many';
