-- Node: the name under which this database is known to the others.
--
-- Promises a name that is unique per database without anybody choosing one.

CREATE OR REPLACE FUNCTION tbl_repl.node_name()
RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT coalesce(
        (SELECT n.name FROM tbl_repl.node AS n),
        (SELECT format('%s-%s',
                       left(regexp_replace(current_database(), '[^A-Za-z0-9_]', '_', 'g'), 23),
                       left(md5(format('%s %s', s.system_identifier, current_database())), 8))
         FROM pg_control_system() AS s))
$function$;
COMMENT ON FUNCTION tbl_repl.node_name() IS
    'name of this node: what set_node_name() was given, else the database name and eight digits derived from the system identifier';

CREATE OR REPLACE FUNCTION tbl_repl.set_node_name(name text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    -- others than printable ASCII are not kept in application_name
    IF set_node_name.name IS NULL OR set_node_name.name !~ '^[!-~]{1,32}$' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'invalid node name',
            DETAIL  = 'A node name has 1 to 32 printable ASCII characters and no white space: it is part of application_name on the targets.',
            HINT    = 'Choose a short name that no other node has.';
    END IF;
    DELETE FROM tbl_repl.node;
    INSERT INTO tbl_repl.node (name) VALUES (set_node_name.name);
END
$function$;
COMMENT ON FUNCTION tbl_repl.set_node_name(text) IS
    'names this node; 1 to 32 printable ASCII characters, unique among the nodes that replicate to each other';

CREATE OR REPLACE FUNCTION tbl_repl._place(OUT system_identifier bigint, OUT database_id oid, OUT timeline text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT c.system_identifier, d.oid, CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END
    FROM pg_control_system() AS c, pg_database AS d WHERE d.datname = current_database()
$function$;
COMMENT ON FUNCTION tbl_repl._place() IS 'cluster and database, by which a copy of the database is told from it, and the timeline, which a promotion or restore changes';

CREATE OR REPLACE FUNCTION tbl_repl._note_timeline(target_id integer)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    UPDATE tbl_repl.target_state AS st SET timeline = p.timeline FROM tbl_repl._place() AS p
    WHERE st.target_id = _note_timeline.target_id AND st.timeline <> p.timeline
$function$;
COMMENT ON FUNCTION tbl_repl._note_timeline(integer) IS 'a target is right for this timeline';
