-- Check: what is wrong, and what to do about it.
--
-- Promises every problem at once, on both sides, each with the command that mends it, and no rows where all is
-- well.  Changes nothing, and waits for each server that is out of reach once.  Filters and maps are looked at
-- only through the generated functions, which run as the target's owner.

-- check(): severity: 'error' (changes are lost, refused or stuck), 'warning' (they will be, or rights are too
-- wide), 'notice' (worth knowing).  target_id: NULL for what concerns the whole node.
CREATE OR REPLACE FUNCTION tbl_repl.check()
RETURNS TABLE (target_id integer, severity text, code text, message text, hint text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET quote_all_identifiers = off
AS $function$
DECLARE
    target  tbl_repl.target%ROWTYPE;
    item    record;
    reached jsonb := '{}';  -- connection: what _reach says of it
    conn    text;
    usable  boolean;
BEGIN
    RETURN QUERY SELECT NULL::integer, p.severity, p.code, p.message, p.hint FROM tbl_repl._node_problems() AS p;
    FOR item IN SELECT s.source_id, min(t.target_id) AS first_target
                FROM tbl_repl.source AS s JOIN tbl_repl.target AS t USING (source_id)
                GROUP BY s.source_id ORDER BY 2
    LOOP
        RETURN QUERY SELECT item.first_target, p.severity, p.code, p.message, p.hint FROM tbl_repl._source_problems(item.source_id, item.first_target) AS p;
    END LOOP;
    FOR target IN SELECT t.* FROM tbl_repl.target AS t ORDER BY t.target_id LOOP
        RETURN QUERY SELECT target.target_id, p.severity, p.code, p.message, p.hint FROM tbl_repl._target_problems(target) AS p;
        RETURN QUERY SELECT target.target_id, p.severity, p.code, p.message, p.hint FROM tbl_repl._server_problems(target) AS p;
        CONTINUE WHEN FOUND OR EXISTS (SELECT FROM tbl_repl._owner_without_rights(format('connect_%s', target.target_id)::name));
        conn := tbl_repl._connection_name(target.server, target.owner, target.timeout);
        usable := has_function_privilege(to_regprocedure((tbl_repl._target_functions(target.target_id))[3]), 'EXECUTE');
        CONTINUE WHEN usable IS NULL;  -- it is missing, and was told
        IF NOT usable THEN
            RETURN QUERY SELECT target.target_id, 'notice', 'not_looked_at',
                format('the other side of target %s was not looked at', target.target_id),
                format('Call check() as its owner, role %I.', target.owner);
            CONTINUE;
        END IF;
        IF NOT reached ? conn THEN
            reached := jsonb_set(reached, ARRAY[conn], tbl_repl._reach(target, conn));
        END IF;
        IF reached -> conn <> '{}' THEN
            RETURN QUERY SELECT target.target_id, 'error', p.code, p.message, p.hint
            FROM (VALUES (true, 'node_name_taken', format('server %I: %s', target.server, reached -> conn ->> 'error'),
                          'Name one of them: SELECT tbl_repl.set_node_name(''...'');'),
                         (false, 'unreachable', format('server %I cannot be reached: %s', target.server, reached -> conn ->> 'error'),
                          'See that it runs, and that the options of server and user mapping are right; what is queued is kept.')) AS p (same_name, code, message, hint)
            WHERE p.same_name = (reached -> conn ->> 'sqlstate' = '55000');  -- of _check_node
            CONTINUE;
        END IF;
        RETURN QUERY SELECT target.target_id, p.severity, p.code, p.message, p.hint FROM tbl_repl._remote_problems(target, conn) AS p;
        IF NOT tbl_repl._is_usable(conn) THEN
            reached := jsonb_set(reached, ARRAY[conn], '{"sqlstate": "08006", "error": "the connection was lost"}');
        END IF;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl.check() IS
    'every problem of every target, here and on the other side, with what to do; no rows: all is well';

-- _reach(target, conn): {}, or sqlstate and error where there is no connection.
CREATE OR REPLACE FUNCTION tbl_repl._reach(target tbl_repl.target, conn text)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    error_detail text;
BEGIN
    PERFORM tbl_repl._connect_alive(target.target_id, conn, clock_timestamp() + target.timeout);
    RETURN '{}';
EXCEPTION WHEN assert_failure OR OTHERS THEN
    GET STACKED DIAGNOSTICS error_detail = PG_EXCEPTION_DETAIL;
    RETURN jsonb_build_object('sqlstate', SQLSTATE, 'error', concat_ws(': ', CASE WHEN SQLSTATE <> '08001' THEN SQLERRM END, nullif(btrim(error_detail, E' \n'), '')));
END
$function$;
COMMENT ON FUNCTION tbl_repl._reach(tbl_repl.target, text) IS 'tries the connection to a target: what is wrong with it';

CREATE OR REPLACE FUNCTION tbl_repl._node_problems()
RETURNS TABLE (severity text, code text, message text, hint text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    -- Connecting has no bound there but a cancel, and that of a session of another role takes this right.
    SELECT 'notice', 'cannot_cancel', format('role %I may not cancel sessions of other roles', r.rolname),
           format('From PostgreSQL 16 on nothing else ends a writer that hangs while connecting to a target that accepts connections and does not answer. '
                  'As a superuser: GRANT pg_signal_backend TO %I;', r.rolname)
    FROM pg_roles AS r
    WHERE EXISTS (SELECT FROM tbl_repl.target) AND r.rolname = tbl_repl._owner() AND current_setting('server_version_num')::integer >= 160000
      AND NOT r.rolsuper AND NOT pg_has_role(r.oid, 'pg_signal_backend', 'USAGE')
    UNION ALL
    -- Named connections belong to the session: whoever may call dblink in a session that has shipped something can run
    -- anything on the target through it.
    SELECT 'warning', 'dblink_public', 'everybody may execute the functions of dblink',
           format('Who writes a replicated table could run any SQL on its targets over our connections. As the owner of dblink: '
                  'DO $dblink$DECLARE f regprocedure; BEGIN FOR f IN SELECT d.objid FROM pg_depend AS d JOIN pg_extension AS e ON e.oid = d.refobjid '
                  'WHERE d.classid = ''pg_proc''::regclass AND d.deptype = ''e'' AND e.extname = ''dblink'' AND has_function_privilege(''public'', d.objid, ''EXECUTE'') '
                  'LOOP EXECUTE format(''REVOKE EXECUTE ON FUNCTION %%1$s FROM PUBLIC; GRANT EXECUTE ON FUNCTION %%1$s TO %1$s'', f); END LOOP; END$dblink$;',
                  (SELECT string_agg(replace(replace(quote_ident(c.name), '%', '%%'), '''', ''''''), ', ' ORDER BY c.name)
                   FROM (SELECT tbl_repl._owner() UNION SELECT t.owner FROM tbl_repl.target AS t) AS c (name)))
    WHERE EXISTS (SELECT FROM tbl_repl.target)
      AND EXISTS (SELECT FROM pg_depend AS d JOIN pg_extension AS e ON e.oid = d.refobjid JOIN pg_proc AS f ON f.oid = d.objid
                  WHERE d.classid = 'pg_proc'::regclass AND d.deptype = 'e' AND e.extname = 'dblink' AND f.proname <> 'dblink_fdw_validator'
                    AND has_function_privilege('public', f.oid, 'EXECUTE'))
$function$;
COMMENT ON FUNCTION tbl_repl._node_problems() IS 'problems that concern the whole node';

-- _source_problems(source_id, any_target): table, key and capture of one replicated table.
CREATE OR REPLACE FUNCTION tbl_repl._source_problems(source_id integer, any_target integer)
RETURNS TABLE (severity text, code text, message text, hint text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    source  tbl_repl.source%ROWTYPE;
    rebuild text := format('SELECT tbl_repl.alter_target(%s);', any_target);
BEGIN
    SELECT * INTO source FROM tbl_repl.source AS s WHERE s.source_id = _source_problems.source_id;
    IF NOT FOUND THEN
        RETURN;  -- dropped a moment ago
    ELSIF NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = source.source_table) THEN
        RETURN QUERY SELECT 'error', 'source_missing', format('the replicated table with OID %s does not exist any more', source.source_table::oid),
            format('End its replication: %s', (SELECT string_agg(format('SELECT tbl_repl.drop_target(%s);', t.target_id), ' ' ORDER BY t.target_id)
                                               FROM tbl_repl.target AS t WHERE t.source_id = source.source_id));
        RETURN;
    END IF;
    RETURN QUERY
        SELECT 'error', 'capture_without_rights',
               format('writes to table %s fail: %s, which owns tbl_repl.%I, may not use tbl_repl', source.source_table,
                      coalesce('role ' || quote_ident(o.role_name), 'a role that does not exist'), c.name),
               coalesce(tbl_repl._grant_hint(o.role_name),
                        format('As a superuser: ALTER FUNCTION tbl_repl.%I() OWNER TO ...; or drop the targets and add them anew.', c.name))
        FROM (SELECT format('capture_%s', source.source_id)::name) AS c (name)
        CROSS JOIN LATERAL tbl_repl._owner_without_rights(c.name) AS o;
    BEGIN
        PERFORM tbl_repl._find_key(source.source_table, source.key_columns);
    EXCEPTION WHEN invalid_table_definition OR undefined_column THEN
        RETURN QUERY SELECT 'error', 'source_key_missing', SQLERRM,
            CASE tbl_repl._key_state(source)
                WHEN 'renamed' THEN format('Take note of the new name: %s', rebuild)
                WHEN 'dropped' THEN tbl_repl._other_key_hint(source)
                ELSE format('Create a unique index on not-null columns (%s) of table %s again, or drop the target.',
                            (SELECT string_agg(quote_ident(k), ', ') FROM unnest(source.key_columns) AS k), source.source_table) END;
        RETURN;  -- nothing generated can be compared
    END;
    IF source.capture = 'statement' AND tbl_repl._capture_kind(source.source_table) = 'row' THEN
        RETURN QUERY SELECT 'error', 'became_partition', format('table %s is a partition now: what is written through its parent is not captured', source.source_table),
            format('Capture row by row: %s Then compare: SELECT * FROM tbl_repl.compare_target(%s);', rebuild, any_target);
    ELSIF source.capture = 'statement' AND EXISTS (SELECT FROM pg_inherits AS i WHERE source.source_table IN (i.inhparent, i.inhrelid)) THEN
        RETURN QUERY SELECT 'error', 'inheritance',
            format(CASE WHEN EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhparent = source.source_table)
                        THEN 'table %s has got children, whose rows are not captured'
                        ELSE 'table %s has got a parent: what is written through it is not captured' END, source.source_table),
            'Use declarative partitioning, or replicate tables without parents and children.'::text;
    END IF;
    RETURN QUERY
        SELECT 'error', 'trigger_missing',
               CASE WHEN w.table_name = source.source_table THEN format('trigger %I of table %s is missing', w.trigger_name, w.table_name)
                    ELSE format('trigger %I of partition %s is missing', w.trigger_name, w.table_name) END,
               format('Create it: %s Then compare: SELECT * FROM tbl_repl.compare_target(%s);', rebuild, any_target)
        FROM tbl_repl._trigger_sql(source.source_id) AS w
        WHERE NOT EXISTS (SELECT FROM pg_trigger AS g JOIN pg_proc AS f ON f.oid = g.tgfoid
                          WHERE g.tgrelid = w.table_name AND g.tgname = w.trigger_name AND f.pronamespace = 'tbl_repl'::regnamespace);
    RETURN QUERY
        SELECT 'warning', 'trigger_left', format('trigger %I is left on table %s, which is no partition of %s any more', h.tgname, h.rel, source.source_table),
               format('Take it away: %s', rebuild)
        FROM tbl_repl._capture_triggers(source.source_id) AS h
        WHERE h.rel <> source.source_table AND NOT EXISTS (SELECT FROM pg_partition_tree(source.source_table) AS t WHERE t.relid = h.rel);
    RETURN QUERY
        SELECT 'error', 'trigger_disabled', format('trigger %I of table %s is disabled', g.tgname, g.tgrelid::regclass),
               format('ALTER TABLE %s ENABLE TRIGGER %I; Then compare: SELECT * FROM tbl_repl.compare_target(%s);', g.tgrelid::regclass, g.tgname, any_target)
        FROM pg_trigger AS g
        WHERE g.tgenabled IN ('D', 'R') AND g.tgname LIKE format('\_tbl\_repl\_%s\_%%', source.source_id)
          AND (g.tgrelid = source.source_table OR g.tgrelid IN (SELECT t.relid FROM pg_partition_tree(source.source_table) AS t))
        ORDER BY g.tgrelid::regclass::text, g.tgname;
    RETURN QUERY SELECT p.severity, p.code, p.message, format('Build it anew: %s', rebuild)
                 FROM tbl_repl._generated_problem(format('capture_%s', source.source_id), tbl_repl._capture_sql(source.source_id)) AS p;
END
$function$;
COMMENT ON FUNCTION tbl_repl._source_problems(integer, integer) IS 'problems of a replicated table, on this side';

-- 'there' | 'renamed': alter_target finds it (see _follow_keys) | 'dropped'.
CREATE OR REPLACE FUNCTION tbl_repl._key_state(source tbl_repl.source)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN bool_and(k.named IS NOT NULL) THEN 'there' WHEN bool_and(coalesce(k.named, a.attnum) IS NOT NULL) THEN 'renamed' ELSE 'dropped' END
    FROM unnest(tbl_repl._column_numbers(source.source_table, source.key_columns), source.key_numbers) AS k (named, was)
    LEFT JOIN pg_attribute AS a ON a.attrelid = source.source_table AND a.attnum = k.was AND NOT a.attisdropped
$function$;
COMMENT ON FUNCTION tbl_repl._key_state(tbl_repl.source) IS 'what has become of the key columns of a replicated table';

-- A target keeps its key.
CREATE OR REPLACE FUNCTION tbl_repl._other_key_hint(source tbl_repl.source)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('A target keeps its key. Give the table another one, then %s and add_target(..., key_columns => ...) anew.',
                  string_agg(format('SELECT tbl_repl.drop_target(%s);', t.target_id), ' ' ORDER BY t.target_id))
    FROM tbl_repl.target AS t WHERE t.source_id = source.source_id
$function$;
COMMENT ON FUNCTION tbl_repl._other_key_hint(tbl_repl.source) IS 'what to do where a key column was dropped';

-- _generated_problem(name, text): whether the function of that name is what its generator says.
CREATE OR REPLACE FUNCTION tbl_repl._generated_problem(name name, statement text)
RETURNS TABLE (severity text, code text, message text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    body  text;
    head  text[];
    found_function record;
BEGIN
    SELECT f.prosrc, f.prosecdef,
           ARRAY(SELECT lower(regexp_replace(c, '[ ''"]', '', 'g')) FROM unnest(f.proconfig) AS c ORDER BY 1) AS settings
    INTO found_function
    FROM pg_proc AS f WHERE f.pronamespace = 'tbl_repl'::regnamespace AND f.proname = _generated_problem.name;
    IF NOT FOUND THEN
        RETURN QUERY SELECT 'error', 'function_missing', format('function tbl_repl.%I is missing', _generated_problem.name);
        RETURN;
    END IF;
    -- the statement ends with the body as a literal
    EXECUTE concat('SELECT ', substr(statement, strpos(statement, E'\nAS ') + 4)) INTO body;
    head := ARRAY(SELECT lower(regexp_replace(m[1], '[ ''"]', '', 'g'))
                  FROM regexp_matches(left(statement, strpos(statement, E'\nAS ')), '^SET ([^\n]*)$', 'gn') AS m ORDER BY 1);
    IF body IS DISTINCT FROM found_function.prosrc OR head IS DISTINCT FROM found_function.settings OR NOT found_function.prosecdef THEN
        RETURN QUERY SELECT 'error', 'function_changed',
            format('function tbl_repl.%I is not what the definition of its target asks for', _generated_problem.name);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._generated_problem(name, text) IS 'compares a generated function with its generator';

-- _owner_without_rights(name): the owner of a generated function, where he may not do what it does.  It runs with his
-- rights, which grant_access has given; who has got it since by REASSIGN OWNED has none.  role_name NULL: there is no such role.
CREATE OR REPLACE FUNCTION tbl_repl._owner_without_rights(name name)
RETURNS TABLE (role_id oid, role_name name)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT f.proowner, r.rolname
    FROM pg_proc AS f LEFT JOIN pg_roles AS r ON r.oid = f.proowner
    WHERE f.pronamespace = 'tbl_repl'::regnamespace AND f.proname = _owner_without_rights.name
      AND (r.oid IS NULL
           OR NOT has_schema_privilege(r.oid, f.pronamespace, 'USAGE')
           OR EXISTS (SELECT FROM unnest('{change,stash,flush}'::name[]) AS t (name)
                      WHERE NOT has_table_privilege(r.oid, format('tbl_repl.%I', t.name), 'INSERT'))
           OR EXISTS (SELECT FROM regexp_matches(f.prosrc, 'tbl_repl[.]([a-z_0-9]+)[(]', 'g') AS m
                      JOIN pg_proc AS g ON g.pronamespace = f.pronamespace AND g.proname = m[1]
                      WHERE NOT has_function_privilege(r.oid, g.oid, 'EXECUTE')))
$function$;
COMMENT ON FUNCTION tbl_repl._owner_without_rights(name) IS
    'the owner of a generated function who lacks the rights that it needs';

CREATE OR REPLACE FUNCTION tbl_repl._grant_hint(role_name name)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('As role %I: SELECT tbl_repl.grant_access(%L, ''operator'');', tbl_repl._owner(), quote_ident(role_name)) WHERE role_name IS NOT NULL
$function$;
COMMENT ON FUNCTION tbl_repl._grant_hint(name) IS 'what gives a role the rights of an operator';

-- _target_problems(target): definition and state, on this side.
CREATE OR REPLACE FUNCTION tbl_repl._target_problems(target tbl_repl.target)
RETURNS TABLE (severity text, code text, message text, hint text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    source  tbl_repl.source%ROWTYPE;
    state   tbl_repl.target_state%ROWTYPE;
    pending record;
    number  bigint;
    failing text;
    advice  text;
    rebuild text := format('SELECT tbl_repl.alter_target(%s);', target.target_id);
    drained text := format('CALL tbl_repl.drain(%L); or run tbl-repl worker.', target.server);
BEGIN
    SELECT * INTO source FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
    SELECT * INTO state FROM tbl_repl.target_state AS st WHERE st.target_id = target.target_id;
    IF NOT FOUND OR NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = source.source_table) THEN
        RETURN;  -- dropped a moment ago; or told with the source
    END IF;

    RETURN QUERY
        SELECT 'error', 'source_column_missing', format('column %I of table %s is sent, but does not exist any more', m[1], source.source_table),
               CASE WHEN m[1] = ANY (source.key_columns) AND tbl_repl._key_state(source) = 'dropped' THEN tbl_repl._other_key_hint(source)
                    WHEN target.columns IS NULL THEN format('Take it out: %s', rebuild)
                    ELSE format('SELECT tbl_repl.alter_target(%s, columns => ...); without it.', target.target_id) END
        FROM (SELECT DISTINCT coalesce(substr(e, 3), '') FROM unnest(target.sent_exprs) AS e WHERE e ~ '^s\.([a-z_][a-z0-9_$]*|"([^"]|"")+")$') AS x (quoted)
        CROSS JOIN LATERAL parse_ident(x.quoted) AS m
        WHERE NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = source.source_table AND a.attname = m[1] AND a.attnum > 0 AND NOT a.attisdropped);
    IF NOT FOUND THEN
        IF (SELECT bool_and(coalesce(has_function_privilege(to_regprocedure(f), 'EXECUTE'), false))
            FROM unnest((tbl_repl._target_functions(target.target_id))[1:2]) AS f)
           -- that has another cause, which is told
           AND NOT EXISTS (SELECT FROM (VALUES ('render'), ('page')) AS k (kind),
                                       tbl_repl._owner_without_rights(format('%s_%s', k.kind, target.target_id)::name))
        THEN
            -- as the owner, on no row: whether every expression still means something
            BEGIN
                EXECUTE format('SELECT tbl_repl.page_%s(NULL, 0)', target.target_id);
                EXECUTE format('SELECT tbl_repl.render_%s(''{}'', false, true, ''plain'')', target.target_id);
            EXCEPTION WHEN deadlock_detected OR lock_not_available THEN
                NULL;  -- somebody changes the table just now
            WHEN assert_failure OR OTHERS THEN
                GET STACKED DIAGNOSTICS failing = MESSAGE_TEXT, advice = PG_EXCEPTION_HINT;
            END;
        END IF;
        IF failing IS NOT NULL THEN
            RETURN QUERY SELECT 'error', 'definition_broken', format('the state of target %s cannot be read: %s', target.target_id, failing),
                coalesce(nullif(advice, ''), format('Mend what is missing, or define it anew: %s', rebuild));
        ELSE
            RETURN QUERY SELECT p.severity, p.code, p.message, format('Build it anew: %s', rebuild)
                FROM (VALUES (format('render_%s', target.target_id), tbl_repl._render_sql(target.target_id)),
                             (format('page_%s', target.target_id), tbl_repl._page_sql(target.target_id)),
                             (format('connect_%s', target.target_id), tbl_repl._connect_sql(target.target_id)),
                             (format('row_%s', target.target_id), tbl_repl._row_sql(target.target_id)),
                             (format('digest_%s', target.target_id), tbl_repl._digest_sql(target.target_id))) AS g (name, statement)
                CROSS JOIN LATERAL tbl_repl._generated_problem(g.name::name, g.statement) AS p;
        END IF;
    END IF;
    IF target.columns IS NULL THEN
        RETURN QUERY
            SELECT 'notice', 'column_not_sent', format('column %I of table %s is not sent', a.attname, source.source_table),
                   format('Add it to %s on the target, then: %s and SELECT tbl_repl.resync_target(%s);', tbl_repl._dst_table(target), rebuild, target.target_id)
            FROM pg_attribute AS a
            WHERE a.attrelid = source.source_table AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
              AND a.attname <> ALL (target.sent_columns) AND format('s.%I', a.attname) <> ALL (target.sent_exprs)
            ORDER BY a.attnum;
    END IF;

    -- a connection has one timeout, and a transaction over two of them is two there
    RETURN QUERY
        SELECT 'warning', 'timeouts_differ', format('targets %s and %s of server %I have different timeouts, so a transaction over both is shipped in two', o.target_id, target.target_id, target.server),
               format('SELECT tbl_repl.alter_target(%s, timeout => %L);', target.target_id, o.timeout)
        FROM (SELECT DISTINCT ON (x.server) x.* FROM tbl_repl.target AS x WHERE x.server = target.server AND x.owner = target.owner ORDER BY x.server, x.target_id) AS o
        WHERE o.timeout <> target.timeout;

    pending := tbl_repl._pending_rows(target.target_id);
    IF state.status = 'failed' THEN
        RETURN QUERY SELECT 'error', 'failed', format('target %s has failed: %s', target.target_id, coalesce(state.last_error, 'no error is known')),
            format('Mend it, then: %s and %s', CASE WHEN state.last_error IS NULL THEN format('SELECT tbl_repl.resume_target(%s);', target.target_id) ELSE rebuild END, drained);
    ELSIF state.status = 'paused' THEN
        RETURN QUERY SELECT 'notice', 'paused', format('target %s is paused, %s rows are queued', target.target_id, pending.rows),
            format('SELECT tbl_repl.resume_target(%s);', target.target_id);
    ELSIF pending.rows > 0 AND state.last_error_at > coalesce(tbl_repl._shipped_at(target.target_id), '-infinity') THEN
        RETURN QUERY SELECT 'warning', 'queueing', format('%s rows are queued for target %s since an error: %s', pending.rows, target.target_id, state.last_error),
            format('When the target is well again: %s', drained);
    ELSIF pending.oldest < clock_timestamp() - tbl_repl._old_after() THEN
        RETURN QUERY SELECT 'warning', 'queue_old', format('%s rows are queued for target %s, the oldest since %s', pending.rows, target.target_id,
                                                          date_trunc('second', pending.oldest)), format('Nobody ships them: %s', drained);
    END IF;
    IF pending.rows > tbl_repl._many_rows() THEN
        RETURN QUERY SELECT 'warning', 'queue_large', format('%s rows are queued for target %s', pending.rows, target.target_id),
            format('Ship them: %s; or give the target up: SELECT tbl_repl.drop_target(%s);', drained, target.target_id);
    END IF;
    SELECT count(*) INTO number FROM tbl_repl.quarantined AS q WHERE q.target_id = target.target_id;
    IF number > 0 THEN
        RETURN QUERY SELECT 'warning', 'quarantine', format('the target rejects %s rows', number),
            format('See tbl_repl.quarantine; mend row or target, then: %s', drained);
    END IF;
    IF (state.system_identifier, state.database_id) <> (SELECT p.system_identifier, p.database_id FROM tbl_repl._place() AS p) THEN
        RETURN QUERY SELECT 'warning', 'restored', format('the position of target %s comes from another cluster or database', target.target_id),
            format('If this is a copy that must not replicate: SELECT tbl_repl.drop_target(%s); else: %s then SELECT tbl_repl.repair_target(%s);%s',
                   target.target_id, drained, target.target_id,
                   (SELECT ' Beside the original it needs a name of its own: SELECT tbl_repl.set_node_name(''...'');' FROM tbl_repl.node));
    ELSIF state.timeline <> (SELECT p.timeline FROM tbl_repl._place() AS p) THEN
        RETURN QUERY SELECT 'warning', 'timeline_changed', format('this server was promoted, or restored to an earlier time, since target %s was defined or repaired', target.target_id),
            format('What it has lost may still be on the target: SELECT * FROM tbl_repl.compare_target(%1$s); SELECT tbl_repl.repair_target(%1$s, delete_extra => true); %2$s', target.target_id, drained);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._target_problems(tbl_repl.target) IS 'problems of a target, on this side';

CREATE OR REPLACE FUNCTION tbl_repl._old_after() RETURNS interval
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN '5 minutes'::interval;
COMMENT ON FUNCTION tbl_repl._old_after() IS 'age of queued rows from which check() speaks of it';

CREATE OR REPLACE FUNCTION tbl_repl._many_rows() RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1000000;
COMMENT ON FUNCTION tbl_repl._many_rows() IS 'number of queued rows from which check() speaks of it';

-- What keeps a target from being connected to at all; with rows here the other side is not tried.
CREATE OR REPLACE FUNCTION tbl_repl._server_problems(target tbl_repl.target)
RETURNS TABLE (severity text, code text, message text, hint text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    server_id oid := (SELECT f.oid FROM pg_foreign_server AS f WHERE f.srvname = target.server);
    owner_id  oid := (SELECT r.oid FROM pg_roles AS r WHERE r.rolname = target.owner);
BEGIN
    RETURN QUERY
        SELECT 'error', 'owner_changed', format('functions of target %s belong to role %I, not to role %I, who defined it', target.target_id, r.rolname, target.owner),
               CASE WHEN tbl_repl._is_left(target.target_id, r.oid)
                    THEN format('Let role %I own the table and use the server again, then as that role: SELECT tbl_repl.alter_target(%s);', target.owner, target.target_id)
                    ELSE format('As the owner of the table: SELECT tbl_repl.drop_target(%s); and add it anew.', target.target_id) END
        FROM (SELECT DISTINCT f.proowner FROM unnest(tbl_repl._target_functions(target.target_id)) AS s (signature)
              JOIN pg_proc AS f ON f.oid = to_regprocedure(s.signature)) AS f
        JOIN pg_roles AS r ON r.oid = f.proowner
        -- a member may have rebuilt one
        WHERE r.oid <> owner_id AND (r.rolsuper OR NOT pg_has_role(r.oid, owner_id, 'USAGE'))
        ORDER BY r.rolname;
    IF server_id IS NULL THEN
        RETURN QUERY SELECT 'error', 'server_missing', format('server %I does not exist', target.server),
            format('Create it again, with a user mapping for role %I; or SELECT tbl_repl.drop_target(%s);', target.owner, target.target_id);
    ELSIF owner_id IS NULL THEN
        RETURN QUERY SELECT 'error', 'owner_missing', format('role %I, who defined target %s, does not exist', target.owner, target.target_id),
            format('It was renamed or dropped: rename it back; or, as the owner of the table or a superuser: SELECT tbl_repl.drop_target(%s);', target.target_id);
    ELSIF NOT has_server_privilege(owner_id, server_id, 'USAGE') THEN
        RETURN QUERY SELECT 'error', 'server_privilege', format('role %I, who defined target %s, may not use server %I', target.owner, target.target_id, target.server),
            format('GRANT USAGE ON FOREIGN SERVER %I TO %I;', target.server, target.owner);
    ELSIF NOT EXISTS (SELECT FROM pg_user_mappings AS m WHERE m.srvid = server_id AND m.umuser IN (0, owner_id)) THEN
        RETURN QUERY SELECT 'error', 'mapping_missing', format('role %I has no user mapping for server %I', target.owner, target.server),
            format('CREATE USER MAPPING FOR %I SERVER %I OPTIONS (user ''...'', password ''...'');', target.owner, target.server);
    ELSE
        RETURN QUERY
            SELECT 'error', 'target_without_rights',
                   format('nothing is shipped to target %s: %s, which owns its functions, may not use tbl_repl', target.target_id,
                          coalesce('role ' || quote_ident(o.role_name), 'a role that does not exist')),
                   coalesce(tbl_repl._grant_hint(o.role_name), format('SELECT tbl_repl.drop_target(%s); and add it anew.', target.target_id))
            FROM tbl_repl._owner_without_rights(format('connect_%s', target.target_id)::name) AS o
            -- where it is that of the trigger function, it was told with the table
            WHERE o.role_id NOT IN (SELECT c.role_id FROM tbl_repl._owner_without_rights(format('capture_%s', target.source_id)::name) AS c);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._server_problems(tbl_repl.target) IS 'what keeps a target from being connected to';

-- _remote_problems(target, conn): the table as it is there now, against what the definition knows of it.
CREATE OR REPLACE FUNCTION tbl_repl._remote_problems(target tbl_repl.target, conn text)
RETURNS TABLE (severity text, code text, message text, hint text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    facts   jsonb;
    node    jsonb;
    touched text;
    here    text;
    there   text;
    dst     text := tbl_repl._dst_table(target);
    rebuild text := format('SELECT tbl_repl.alter_target(%s);', target.target_id);
BEGIN
    facts := tbl_repl._remote_facts(conn, target.dst_schema, target.dst_name, clock_timestamp() + target.timeout);
    IF (facts ->> 'read_only')::boolean THEN
        RETURN QUERY SELECT 'error', 'remote_read_only', format('server %I leads to a server that takes no writes, perhaps a standby', target.server),
            format('Lead it to the primary; of several hosts: ALTER SERVER %I OPTIONS (ADD target_session_attrs ''read-write'');', target.server);
    END IF;
    IF NOT (facts ->> 'usable')::boolean THEN
        RETURN QUERY SELECT 'error', 'remote_privilege', format('role %s may not use schema %I on the target', facts ->> 'user', target.dst_schema),
            format('There: GRANT USAGE ON SCHEMA %I TO %I;', target.dst_schema, facts ->> 'user');
    END IF;
    IF NOT coalesce((facts ->> 'writable')::boolean, false) THEN
        RETURN QUERY SELECT 'error', 'remote_privilege', format('role %s may not write table %s on the target', facts ->> 'user', dst),
            format('There: GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON %s TO %I;', dst, facts ->> 'user');
    END IF;
    IF (facts ->> 'policies')::boolean THEN
        RETURN QUERY SELECT 'warning', 'remote_row_security', format('row-level security of table %s on the target applies to role %s', dst, facts ->> 'user'),
            format('What it hides there is neither changed nor deleted. There: ALTER ROLE %1$I BYPASSRLS; or CREATE POLICY ... ON %2$s TO %1$I USING (true);', facts ->> 'user', dst);
    END IF;
    IF NOT EXISTS (SELECT FROM jsonb_array_elements(facts -> 'keys') AS k WHERE k @> to_jsonb(target.dst_keys) AND k <@ to_jsonb(target.dst_keys)) THEN
        RETURN QUERY SELECT 'error', 'remote_key_missing', format('table %s on the target has no unique index on (%s)', dst, k.list),
            format('There: CREATE UNIQUE INDEX ON %s (%s);', dst, k.list)
        FROM (SELECT string_agg(quote_ident(d), ', ') AS list FROM unnest(target.dst_keys) AS d) AS k;
    END IF;
    RETURN QUERY
        SELECT 'error', 'remote_column_missing', format('column %I of table %s does not exist on the target', c.name, dst),
               format('Add it there, or leave it out: SELECT tbl_repl.alter_target(%s, columns => ...);', target.target_id)
        FROM unnest(target.sent_columns) WITH ORDINALITY AS c (name, n)
        WHERE NOT EXISTS (SELECT FROM jsonb_array_elements(facts -> 'columns') AS f WHERE f ->> 'name' = c.name::text)
        ORDER BY c.n;
    RETURN QUERY
        SELECT 'error', 'remote_column_changed',
               CASE WHEN (f ->> 'generated')::boolean THEN format('column %I of table %s is generated on the target now', c.name, dst)
                    WHEN f ->> 'type' IS DISTINCT FROM k ->> 'type'
                    THEN format('column %I of table %s on the target is of type %s now, it was %s', c.name, dst, f ->> 'type', k ->> 'type')
                    ELSE format('column %I of table %s on the target is not what it was', c.name, dst) END,
               CASE WHEN (f ->> 'generated')::boolean THEN format('Leave it out: SELECT tbl_repl.alter_target(%s, columns => ...);', target.target_id)
                    ELSE format('Take note of it: %s', rebuild) END
        FROM unnest(target.sent_columns) WITH ORDINALITY AS c (name, n)
        JOIN jsonb_array_elements(facts -> 'columns') AS f ON f ->> 'name' = c.name::text
        JOIN jsonb_array_elements(target.remote -> 'columns') AS k ON k ->> 'name' = c.name::text
        WHERE f - '{has_default,notnull}'::text[] IS DISTINCT FROM k - '{has_default,notnull}'::text[]
        ORDER BY c.n;
    RETURN QUERY
        SELECT 'error', 'remote_column_required', format('column %I of table %s on the target is NOT NULL without a default, and not sent', f ->> 'name', dst),
               'There: give it a default, or drop its NOT NULL; or send it.'::text
        FROM jsonb_array_elements(facts -> 'columns') AS f
        WHERE (f ->> 'notnull')::boolean AND NOT (f ->> 'has_default')::boolean AND NOT (f ->> 'generated')::boolean
          AND f ->> 'name' <> ALL (target.sent_columns::text[]);
    IF (facts -> 'referenced', facts -> 'cascades', facts -> 'followed')
       IS DISTINCT FROM (target.remote -> 'referenced', target.remote -> 'cascades', target.remote -> 'followed')
       OR (SELECT jsonb_agg(u ORDER BY u) FROM jsonb_array_elements(facts -> 'unique') AS u WHERE NOT (u @> to_jsonb(target.dst_keys) AND u <@ to_jsonb(target.dst_keys)))
          IS DISTINCT FROM (SELECT jsonb_agg(u ORDER BY u) FROM jsonb_array_elements(target.remote -> 'unique') AS u) THEN
        RETURN QUERY SELECT 'warning', 'remote_constraints_changed', format('unique or foreign keys of table %s on the target have changed', dst),
            format('Take note of them: %s', rebuild);
    END IF;
    IF target.filter_expr IS NOT NULL AND (facts ->> 'cascades')::boolean THEN
        RETURN QUERY SELECT 'warning', 'filter_cascades', format('rows that leave the filter of target %s take along what refers to them in table %s', target.target_id, dst),
            'There: let those foreign keys be ON DELETE NO ACTION; or filter the tables that refer to it alike.'::text;
    END IF;
    IF target.mode <> 'async' AND (facts ->> 'extension')::boolean AND NOT (facts ->> 'receipts')::boolean THEN
        RETURN QUERY SELECT 'notice', 'receipts_not_allowed', format('role %s may not leave receipts on the target, so rows in doubt after a crash are not found', facts ->> 'user'),
            format('There: SELECT tbl_repl.grant_access(%L, ''operator''); then here: %s', quote_ident(facts ->> 'user'), rebuild);
    ELSIF target.mode <> 'async' AND (facts ->> 'receipts')::boolean AND NOT target.receipts THEN
        RETURN QUERY SELECT 'notice', 'receipts_not_used', 'the target has tbl_repl now, but receipts are not left there yet', format('Take note of it: %s', rebuild);
    END IF;
    IF (facts ->> 'extension')::boolean THEN
        there := tbl_repl._call(conn, 'SELECT pg_catalog.concat_ws(''.'', c.system_identifier, extract(epoch FROM pg_catalog.pg_postmaster_start_time()), pg_catalog.current_database()) FROM pg_catalog.pg_control_system() AS c',
                                clock_timestamp() + target.timeout);
        SELECT concat_ws('.', c.system_identifier, extract(epoch FROM pg_postmaster_start_time()), current_database()) INTO here FROM pg_control_system() AS c;
        IF here <> there AND tbl_repl._call(conn, 'SELECT pg_catalog.has_schema_privilege(''tbl_repl'', ''USAGE'') AND pg_catalog.has_function_privilege(''tbl_repl.node_name()'', ''EXECUTE'')',
                                            clock_timestamp() + target.timeout)::boolean
           AND tbl_repl._call(conn, 'SELECT tbl_repl.node_name()', clock_timestamp() + target.timeout) = tbl_repl.node_name() THEN
            RETURN QUERY SELECT 'error', 'node_name_taken', format('the target''s node has the same name as this one: %s', tbl_repl.node_name()),
                'Name one of them: SELECT tbl_repl.set_node_name(''...'');'::text;
        END IF;
        node := tbl_repl._remote_node(conn, clock_timestamp() + target.timeout);
        IF node ->> 'node' NOT IN (coalesce(target.remote ->> 'node', ''), tbl_repl.node_name()) THEN
            RETURN QUERY SELECT 'warning', 'node_renamed', format('the target''s node is called %s, not %s', node ->> 'node', coalesce(target.remote ->> 'node', 'unknown')),
                format('Changes made there may come back: %s', rebuild);
        END IF;
        IF target.on_conflict <> 'overwrite' AND NOT coalesce((node ->> 'settles')::boolean, false) THEN
            RETURN QUERY SELECT 'error', 'may_not_settle', format('role %s may not settle conflicts on the target', facts ->> 'user'),
                format('There: SELECT tbl_repl.grant_access(%L, ''operator'');', quote_ident(facts ->> 'user'));
        ELSIF target.on_conflict = 'newest' THEN
            -- targets there that lead to another node, as far as they know: NULL if one leads here
            there := tbl_repl._call(conn, format(
                'SELECT CASE WHEN NOT coalesce(bool_or(t.remote ->> ''node'' = %2$L), false) THEN pg_catalog.concat(''other '', pg_catalog.string_agg(t.target_id::text, '', '')) END '
                'FROM tbl_repl.target AS t JOIN tbl_repl.source AS s USING (source_id) '
                'WHERE s.source_table = pg_catalog.to_regclass(%1$L) AND t.on_conflict = ''newest''', dst, tbl_repl.node_name()), clock_timestamp() + target.timeout);
            IF there IS NOT NULL THEN
                RETURN QUERY SELECT 'warning', 'newest_one_way', format('table %s on the target has no target with on_conflict => ''newest'' back to this node', dst),
                    concat('A value that is refused there could not be answered: add_target there as well, with on_conflict => ''newest''.',
                           ' Or, if this node had another name, there: SELECT tbl_repl.alter_target(N); for N in ' || nullif(substr(there, 7), '') || '.');
            END IF;
        END IF;
        IF target.on_conflict = 'newest' THEN
            touched := tbl_repl._call(conn, format(
                'SELECT pg_catalog.string_agg(pg_catalog.quote_ident(g.tgname), '', '' ORDER BY g.tgname) '
                'FROM pg_catalog.pg_trigger AS g JOIN pg_catalog.pg_proc AS f ON f.oid = g.tgfoid '
                'WHERE g.tgrelid = pg_catalog.to_regclass(%L) AND NOT g.tgisinternal AND g.tgenabled IN (''O'', ''A'') '
                -- before each row that is inserted or updated
                'AND g.tgtype & 3 = 3 AND g.tgtype & 20 <> 0 '
                'AND pg_catalog.concat(f.prosrc, '' '', pg_catalog.encode(g.tgargs, ''escape'')) ~* %L '
                'AND pg_catalog.strpos(pg_catalog.concat(f.prosrc, pg_catalog.pg_get_triggerdef(g.oid)), ''tbl_repl.origin'') = 0', dst,
                format('(^|[^[:alnum:]_])%s($|[^[:alnum:]_])', regexp_replace(target.version_column, '([^[:alnum:]_])', E'\\\\\\1', 'g'))),
                clock_timestamp() + target.timeout);
            RETURN QUERY SELECT 'warning', 'version_changed', format('trigger %s of table %s on the target sets the version of rows that arrive, too', touched, dst),
                'The nodes would keep different rows. Let it leave them alone: CREATE TRIGGER ... WHEN (coalesce(current_setting(''tbl_repl.origin'', true), '''') = '''') ...'::text
            WHERE touched IS NOT NULL;
        END IF;
    ELSIF target.on_conflict <> 'overwrite' THEN
        RETURN QUERY SELECT 'error', 'may_not_settle', 'tbl_repl is not installed on the target, where conflicts are settled',
            'There: CREATE EXTENSION tbl_repl CASCADE;'::text;
    END IF;
EXCEPTION
    WHEN undefined_table THEN
        RETURN QUERY SELECT 'error', 'remote_table_missing', format('table %s does not exist on the target', dst),
            format('Create it there, or name another one: SELECT tbl_repl.alter_target(%s, dst_table => ...);', target.target_id);
    WHEN assert_failure OR OTHERS THEN
        -- whatever the target answers is told, for the targets after this one have to be looked at too
        RETURN QUERY SELECT 'error', 'remote_error', format('the target says: %s', SQLERRM), 'See its log.'::text;
END
$function$;
COMMENT ON FUNCTION tbl_repl._remote_problems(tbl_repl.target, text) IS 'problems of a target on the other side';
