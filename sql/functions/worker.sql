-- Worker: what the worker needs from SQL besides replay: who serves, who sleeps, when to try again.

-- _servers_to_replay(busy): every server that has targets, without those named in busy.  wait_seconds: how long
-- until something can be shipped to it, 0: now; NULL: nothing is queued.  copies: targets that can be copied in the
-- background now, referenced tables first.  SECURITY DEFINER: the worker's role may see status only.
CREATE OR REPLACE FUNCTION tbl_repl._servers_to_replay(busy name[] DEFAULT '{}')
RETURNS TABLE (server name, wait_seconds double precision, copies integer[])
LANGUAGE sql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT t.server,
           min(w.seconds) FILTER (WHERE st.copy_after IS NULL AND tbl_repl._has_pending(t.target_id)),
           array_agg(t.target_id ORDER BY s.fk_rank, t.target_id)
                     FILTER (WHERE st.copy_after IS NOT NULL AND w.seconds = 0 AND NOT tbl_repl._is_being_copied(t.target_id))
    FROM tbl_repl.target AS t
    JOIN tbl_repl.target_state AS st USING (target_id)
    JOIN tbl_repl.source AS s USING (source_id)
    CROSS JOIN LATERAL (
        SELECT CASE WHEN tbl_repl._may_replay(st)
                    THEN tbl_repl._seconds_until(st.next_try_at) END AS seconds) AS w
    WHERE t.server <> ALL (busy)
    GROUP BY t.server
    ORDER BY t.server
$function$;
COMMENT ON FUNCTION tbl_repl._servers_to_replay(name[]) IS
    'servers with targets, how long until something can be shipped to each, and what is to be copied';

-- _note_retry(server, since): targets of the server that have failed since then, and have something left, wait
-- for their next try: a tenth of a second, doubled with every failure up to half a minute, with jitter, so
-- that many workers do not come back at once.  Returns the seconds until the first of them, NULL: none.
-- SECURITY DEFINER: the worker's role may not write the tables.
CREATE OR REPLACE FUNCTION tbl_repl._note_retry(server name, since timestamptz)
RETURNS double precision
LANGUAGE sql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
    WITH noted AS (
        UPDATE tbl_repl.target_state AS st
        SET failures = least(st.failures + 1, 1000),
            next_try_at = clock_timestamp() + tbl_repl._retry_after(st.failures)
        FROM tbl_repl.target AS t
        WHERE t.target_id = st.target_id AND t.server = _note_retry.server AND st.status <> 'paused'
          AND st.last_error_at >= since
          AND (st.status = 'failed' OR st.copy_after IS NOT NULL OR tbl_repl._has_pending(st.target_id))
        RETURNING st.next_try_at
    )
    SELECT extract(epoch FROM min(n.next_try_at) - clock_timestamp()) FROM noted AS n
$function$;
COMMENT ON FUNCTION tbl_repl._note_retry(name, timestamptz) IS
    'when the worker tries targets again that have failed, shown in target_status';

CREATE OR REPLACE FUNCTION tbl_repl._retry_after(failures integer)
RETURNS interval
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT make_interval(secs => least(30, 0.1 * 2 ^ least(failures, 12)) * (0.5 + random() / 2))
$function$;
COMMENT ON FUNCTION tbl_repl._retry_after(integer) IS 'how long a target waits after so many failures in a row';

-- More than the 30 seconds that anybody waits: the clock was set back meanwhile.
CREATE OR REPLACE FUNCTION tbl_repl._seconds_until(moment timestamptz)
RETURNS double precision
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN s.seconds BETWEEN 0 AND 30 THEN s.seconds ELSE 0 END
    FROM (SELECT extract(epoch FROM moment - clock_timestamp())::double precision AS seconds) AS s
$function$;
COMMENT ON FUNCTION tbl_repl._seconds_until(timestamptz) IS 'how long until something is tried again, 0: now';

-- Sessions that are connecting to a server now; who has been at it for longer than patience_seconds hangs.
CREATE OR REPLACE FUNCTION tbl_repl._connecting()
RETURNS TABLE (pid integer, lock_key bigint, patience_seconds double precision)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT l.pid, l.objid::bigint,
           (SELECT extract(epoch FROM max(t.timeout)) FROM tbl_repl.target AS t
            WHERE tbl_repl._connect_key(tbl_repl._connection_name(t.server, t.owner, t.timeout))::bigint & 4294967295 = l.objid::bigint)
    FROM pg_locks AS l
    WHERE l.locktype = 'advisory' AND l.granted AND l.classid = tbl_repl._lock_connect()::oid
      AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
$function$;
COMMENT ON FUNCTION tbl_repl._connecting() IS
    'sessions that are connecting to a server: from 16 on only the worker bounds that';
