-- Worker: what the worker needs from SQL besides replay: who serves, who sleeps, when to try again.

CREATE OR REPLACE FUNCTION tbl_repl._lock_sleep() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607284;
COMMENT ON FUNCTION tbl_repl._lock_sleep() IS
    'class of the advisory lock sleep: exclusive while the worker sleeps; who writes an async table tries to share it to his commit, and notifies if he cannot';

CREATE OR REPLACE FUNCTION tbl_repl._lock_worker() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607285;
COMMENT ON FUNCTION tbl_repl._lock_worker() IS
    'class of the advisory lock worker: held by the worker that serves this database';

-- Something that replay could ship now.  SECURITY DEFINER: the worker's role may see status only.
CREATE OR REPLACE FUNCTION tbl_repl._anything_to_replay()
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item record;
BEGIN
    FOR item IN
        SELECT st.target_id, st.status FROM tbl_repl.target_state AS st
        WHERE st.status <> 'paused' AND (st.next_try_at IS NULL OR st.next_try_at <= clock_timestamp())
    LOOP
        IF item.status <> 'ok' OR tbl_repl._has_pending(item.target_id) THEN
            RETURN true;
        END IF;
    END LOOP;
    RETURN false;
END
$function$;
COMMENT ON FUNCTION tbl_repl._anything_to_replay() IS
    'whether something is queued that may be shipped now';

-- SECURITY DEFINER: the worker's role may not write the tables.
CREATE OR REPLACE FUNCTION tbl_repl._note_retry(server name, seconds double precision)
RETURNS void
LANGUAGE sql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
    UPDATE tbl_repl.target_state AS st
    SET next_try_at = clock_timestamp() + make_interval(secs => _note_retry.seconds)
    FROM tbl_repl.target AS t
    WHERE t.target_id = st.target_id AND t.server = _note_retry.server AND st.status <> 'paused'
$function$;
COMMENT ON FUNCTION tbl_repl._note_retry(name, double precision) IS
    'when the worker tries a server again, shown in target_status';
