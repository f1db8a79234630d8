-- The security surface on one page: nothing for PUBLIC; what others may do is granted by name, by
-- grant_access.  Who writes a replicated table needs no right here: capture and flush run as their owners.
REVOKE ALL ON SCHEMA tbl_repl FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA tbl_repl FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA tbl_repl FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA tbl_repl FROM PUBLIC;
