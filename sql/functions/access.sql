-- Access: what the two kinds of users besides the owner of the extension may do.

-- grant_access(role, level): 'reader' sees status, queue and errors, no row contents; 'operator' may define
-- and run targets of tables that he owns.  For the owner of the extension.
CREATE OR REPLACE FUNCTION tbl_repl.grant_access(role regrole, level text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    grantee text := role::text;
    item    record;
BEGIN
    IF role IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'role must not be NULL',
            HINT    = 'Name a role: SELECT tbl_repl.grant_access(''...'', ''operator'');';
    END IF;
    PERFORM tbl_repl._check_word('access level', level, '{operator,reader}');
    EXECUTE format('GRANT USAGE ON SCHEMA tbl_repl TO %s', grantee);
    EXECUTE format('GRANT SELECT ON tbl_repl.target_status, tbl_repl.pending, tbl_repl.quarantine, tbl_repl.conflict_log, tbl_repl.copy_progress, tbl_repl.node TO %s', grantee);
    EXECUTE format('GRANT SELECT (at, target_id, key, sqlstate, message, hint) ON tbl_repl.error_log TO %s', grantee);
    EXECUTE format('GRANT EXECUTE ON FUNCTION tbl_repl._pending_rows(integer), tbl_repl._pending_keys(boolean), tbl_repl._key_json(regclass, name[], text), tbl_repl._key_json_sql(regclass, name[]), '
                   'tbl_repl._key_parts(regclass, name[]), tbl_repl.node_name(), tbl_repl.change_token(), '
                   'tbl_repl.wait_for(integer, text, interval) TO %s', grantee);
    IF level = 'operator' THEN
        -- CREATE: the functions generated for a target belong to who defines it
        EXECUTE format('GRANT CREATE ON SCHEMA tbl_repl TO %s', grantee);
        EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA tbl_repl TO %s', grantee);
        EXECUTE format('GRANT INSERT, UPDATE, DELETE ON tbl_repl.source, tbl_repl.target, tbl_repl.target_state, tbl_repl.progress, tbl_repl.change, '
                       'tbl_repl.stash, tbl_repl.flush, tbl_repl.shipped, tbl_repl.quarantined, tbl_repl.error, tbl_repl.tombstone, tbl_repl.conflict, tbl_repl.boot TO %s', grantee);
        EXECUTE format('GRANT USAGE ON ALL SEQUENCES IN SCHEMA tbl_repl TO %s', grantee);
        FOR item IN
            SELECT f.oid::regprocedure AS signature
            FROM pg_proc AS f
            JOIN pg_roles AS r ON r.oid = f.proowner AND r.rolname = tbl_repl._owner()
            WHERE f.pronamespace = 'tbl_repl'::regnamespace
              -- not those generated for tables and targets
              AND f.proname !~ '_[0-9]+$'
              AND f.proname <> ALL ('{grant_access,set_node_name,_flush}'::name[])
        LOOP
            EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO %s', item.signature, grantee);
        END LOOP;
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl.grant_access(regrole, text) IS
    'lets a role read the views (reader) or define and run targets of its own tables (operator)';

-- Where the script was run without CREATE EXTENSION there is a schema only; where both are, they have one owner.
CREATE OR REPLACE FUNCTION tbl_repl._owner()
RETURNS name
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT r.rolname FROM pg_namespace AS n JOIN pg_roles AS r ON r.oid = n.nspowner WHERE n.nspname = 'tbl_repl'
$function$;
COMMENT ON FUNCTION tbl_repl._owner() IS 'the role that has installed tbl_repl';

-- pg_dump tells who owns a target and the functions generated for it, but not who owned the extension: restored by
-- another role, that role does, and every write to a replicated table would fail for want of rights.  So whoever
-- loads definitions as owner of the extension lets their owners go on; nobody else can grant anything here.
CREATE OR REPLACE FUNCTION tbl_repl._admit_owner()
RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF NEW.owner <> current_user AND pg_has_role(current_user, tbl_repl._owner(), 'USAGE') THEN
        PERFORM tbl_repl.grant_access(r.oid::regrole, 'operator') FROM pg_roles AS r
        WHERE r.rolname = NEW.owner AND NOT has_table_privilege(r.oid, 'tbl_repl.stash', 'INSERT');
    END IF;
    RETURN NULL;
END
$function$;
COMMENT ON FUNCTION tbl_repl._admit_owner() IS
    'lets the owner of a restored target run it, where another role has restored the extension';
CREATE OR REPLACE TRIGGER admit_owner AFTER INSERT ON tbl_repl.target
    FOR EACH ROW EXECUTE FUNCTION tbl_repl._admit_owner();
