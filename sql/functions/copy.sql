-- Copy: a whole table in pieces (table piece, view copy_progress), by several connections at once, while writers go on.
--
-- Capture goes on, and everything that is written queues until the copy has ended; then the queue brings the
-- newer state.  So a piece may be read and applied at any time, twice too, as long as nothing else is shipped to the
-- target: replay leaves a target alone that is being copied in pieces.

-- _copy_begin(target_id, background): sets the target to copying, or goes on with a copy that was interrupted.  Whoever
-- holds the lock copy works at it; when nobody does any more, worker, replay and drain go on with it, as with every copy
-- in the background (which it is: background says only that none must be begun).  Locks ship, to wait for shippers in flight:
-- so it is a transaction of its own, short, before _copy_divide.
-- Errors: 55000 while the target is paused or failed; 0A000 where it has a conflict policy.
CREATE OR REPLACE FUNCTION tbl_repl._copy_begin(target_id integer, background boolean DEFAULT false)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    state record;
BEGIN
    IF (tbl_repl._own_target(target_id)).on_conflict <> 'overwrite' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = format('target %s cannot be copied in pieces', target_id),
            DETAIL  = 'Its rows are settled one by one on the target, by its conflict policy.',
            HINT    = format('Queue them: SELECT tbl_repl.resync_target(%s); then drain.', target_id);
    END IF;
    IF EXISTS (SELECT FROM tbl_repl.piece AS p WHERE p.target_id = _copy_begin.target_id) THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock(tbl_repl._lock_ship(), target_id);
    SELECT st.status, st.copy_after INTO state FROM tbl_repl.target_state AS st
    WHERE st.target_id = _copy_begin.target_id FOR UPDATE;
    IF state.status IN ('paused', 'failed') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('target %s is %s', target_id, state.status),
            HINT    = format('First: SELECT tbl_repl.resume_target(%s);', target_id);
    END IF;
    IF background AND state.copy_after IS NULL THEN
        RETURN;  -- replay has ended it meanwhile
    END IF;
    UPDATE tbl_repl.target_state AS st
    SET status = 'copying', copy_after = coalesce(st.copy_after, '{}'), rows_copied = CASE WHEN st.copy_after IS NULL THEN 0 ELSE st.rows_copied END
    WHERE st.target_id = _copy_begin.target_id;
END
$function$;
COMMENT ON FUNCTION tbl_repl._copy_begin(integer, boolean) IS
    'lets everything queue behind a copy that begins, or goes on with one';

-- _copy_divide(target_id, piece_rows): divides what _copy_begin has begun, where it is not divided yet; returns the number of
-- pieces to do, 0: nothing is being copied.
CREATE OR REPLACE FUNCTION tbl_repl._copy_divide(target_id integer, piece_rows integer)
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    copied tbl_repl.target_state.copy_after%TYPE;
    last   text;
    page   text[];
    n      integer := 0;
BEGIN
    PERFORM tbl_repl._own_target(target_id);
    SELECT st.copy_after INTO copied FROM tbl_repl.target_state AS st WHERE st.target_id = _copy_divide.target_id;
    IF copied IS NULL THEN
        RETURN 0;
    END IF;
    UPDATE tbl_repl.piece AS p SET state = 'todo' WHERE p.target_id = _copy_divide.target_id AND p.state = 'running';
    IF EXISTS (SELECT FROM tbl_repl.piece AS p WHERE p.target_id = _copy_divide.target_id) THEN
        RETURN (SELECT count(*) FROM tbl_repl.piece AS p WHERE p.target_id = _copy_divide.target_id AND p.state <> 'done');
    END IF;
    last := copied[1];
    LOOP
        EXECUTE format('SELECT tbl_repl.page_%s($1, $2)', target_id) INTO page USING last, piece_rows;
        EXIT WHEN page IS NULL;
        n := n + 1;
        INSERT INTO tbl_repl.piece (target_id, n, after, upto, rows_planned)
        VALUES (target_id, n, last, page[cardinality(page)], cardinality(page));
        last := page[cardinality(page)];
    END LOOP;
    RETURN n;
END
$function$;
COMMENT ON FUNCTION tbl_repl._copy_divide(integer, integer) IS
    'divides a table into pieces to copy, or goes on with those that are left';

-- _copy_next(target_id): claims a piece; no row: none is left.
CREATE OR REPLACE FUNCTION tbl_repl._copy_next(target_id integer)
RETURNS TABLE (n integer, dst_table text, dst_columns text, is_binary boolean, rows_query text, stage text, merge text)
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target tbl_repl.target%ROWTYPE;
    source tbl_repl.source%ROWTYPE;
    piece  tbl_repl.piece%ROWTYPE;
    parts  record;
BEGIN
    UPDATE tbl_repl.piece AS p SET state = 'running', started_at = clock_timestamp()
    WHERE p.target_id = _copy_next.target_id
      AND EXISTS (SELECT FROM tbl_repl.target_state AS st WHERE st.target_id = _copy_next.target_id AND st.status = 'copying')
      AND p.n = (SELECT x.n FROM tbl_repl.piece AS x WHERE x.target_id = _copy_next.target_id AND x.state = 'todo'
                 ORDER BY x.n LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING p.* INTO piece;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT * INTO STRICT target FROM tbl_repl.target AS t WHERE t.target_id = _copy_next.target_id;
    SELECT * INTO STRICT source FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
    parts := tbl_repl._upsert_parts(target);
    n := piece.n;
    dst_table := tbl_repl._dst_table(target);
    dst_columns := tbl_repl._dst_columns(target);
    is_binary := tbl_repl._may_copy_binary(target, source);
    rows_query := format('SELECT %s FROM %s AS s WHERE %s%s%s%s',
        tbl_repl._sent_list(target, is_binary), source.source_table, tbl_repl._sent_as_known(target, source),
        ' AND (' || target.filter_expr || ')',
        CASE WHEN piece.after IS NOT NULL THEN format(' AND (%s)', tbl_repl._key_after(source.source_table, source.key_columns, quote_literal(piece.after))) END,
        format(' AND (%s)', tbl_repl._key_until(source.source_table, source.key_columns, quote_literal(piece.upto))));
    stage := format('CREATE TEMP TABLE tbl_repl_rows ON COMMIT DROP AS SELECT %s FROM %s WITH NO DATA', dst_columns, dst_table);
    merge := format('%s SELECT %s FROM pg_temp.tbl_repl_rows%s', left(parts.head, length(parts.head) - length(' VALUES ')), dst_columns, parts.tail);
    RETURN NEXT;
END
$function$;
COMMENT ON FUNCTION tbl_repl._copy_next(integer) IS
    'claims a piece of a table to copy; SECURITY DEFINER, for the worker''s role';

CREATE OR REPLACE FUNCTION tbl_repl._copy_done(target_id integer, n integer, rows bigint, bytes bigint)
RETURNS void
LANGUAGE sql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
    -- the state first, as drop_target does
    UPDATE tbl_repl.target_state AS st
    SET rows_copied = st.rows_copied + _copy_done.rows
    WHERE st.target_id = _copy_done.target_id;
    UPDATE tbl_repl.piece AS p
    SET state = 'done', done_at = clock_timestamp(), rows_copied = _copy_done.rows, bytes_copied = _copy_done.bytes
    WHERE p.target_id = _copy_done.target_id AND p.n = _copy_done.n;
    SELECT tbl_repl._advance(_copy_done.target_id, _copy_done.rows);
$function$;
COMMENT ON FUNCTION tbl_repl._copy_done(integer, integer, bigint, bigint) IS
    'notes that a piece is committed on the target; SECURITY DEFINER, for the worker''s role';

-- _copy_finish(target_id): whether every piece was done; if so the queue is next, and the worker is told.
CREATE OR REPLACE FUNCTION tbl_repl._copy_finish(target_id integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF EXISTS (SELECT FROM tbl_repl.piece AS p WHERE p.target_id = _copy_finish.target_id AND p.state <> 'done') THEN
        RETURN false;
    END IF;
    UPDATE tbl_repl.target_state AS st
    SET status = CASE WHEN st.status = 'copying' THEN 'queueing' ELSE st.status END, copy_after = NULL
    WHERE st.target_id = _copy_finish.target_id;
    DELETE FROM tbl_repl.piece AS p WHERE p.target_id = _copy_finish.target_id;
    PERFORM pg_notify('tbl_repl', '');
    RETURN true;
END
$function$;
COMMENT ON FUNCTION tbl_repl._copy_finish(integer) IS
    'ends a copy in pieces once all are done; SECURITY DEFINER, for the worker''s role';

-- Asked for a moment only: by the worker, which leaves the pieces alone while somebody is at them.
CREATE OR REPLACE FUNCTION tbl_repl._is_being_copied(target_id integer)
RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT NOT pg_try_advisory_xact_lock_shared(tbl_repl._lock_copy(), target_id)
$function$;
COMMENT ON FUNCTION tbl_repl._is_being_copied(integer) IS 'whether somebody copies a target in pieces now';

-- Whether replay may copy the next page of a target in the background: nobody copies it in pieces, nor has a piece on its
-- way (lock piece: the one that holds copy may have gone before its jobs).  What such a copy has left counts, see
-- _leave_to_replay.  Locks copy and piece, to the end of the transaction.
CREATE OR REPLACE FUNCTION tbl_repl._take_over_copy(target_id integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    conn text;
BEGIN
    IF NOT pg_try_advisory_xact_lock(tbl_repl._lock_copy(), target_id) OR NOT pg_try_advisory_xact_lock(tbl_repl._lock_piece(), target_id) THEN
        RETURN false;
    ELSIF NOT EXISTS (SELECT FROM tbl_repl.piece AS p WHERE p.target_id = _take_over_copy.target_id) THEN
        RETURN true;
    END IF;
    -- Who has copied may have left a session there with a piece on its way: connecting anew ends it.
    SELECT tbl_repl._connection_name(t.server, t.owner, t.timeout) INTO conn
    FROM tbl_repl.target AS t WHERE t.target_id = _take_over_copy.target_id;
    IF conn = ANY (tbl_repl._dblink_connections()) THEN
        PERFORM tbl_repl._dblink_disconnect(conn);
    END IF;
    RETURN true;
END
$function$;
COMMENT ON FUNCTION tbl_repl._take_over_copy(integer) IS
    'whether replay may go on with a copy in the background';

-- Up to the first piece that is not done every row is there.
CREATE OR REPLACE FUNCTION tbl_repl._leave_to_replay(target_id integer)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    UPDATE tbl_repl.target_state AS st
    SET copy_after = coalesce((SELECT array_remove(ARRAY[p.after], NULL) FROM tbl_repl.piece AS p WHERE p.target_id = st.target_id AND p.state <> 'done' ORDER BY p.n LIMIT 1),
                              (SELECT ARRAY[p.upto] FROM tbl_repl.piece AS p WHERE p.target_id = st.target_id ORDER BY p.n DESC LIMIT 1),
                              st.copy_after)
    WHERE st.target_id = _leave_to_replay.target_id AND st.copy_after IS NOT NULL
      AND EXISTS (SELECT FROM tbl_repl.piece AS p WHERE p.target_id = st.target_id);
    DELETE FROM tbl_repl.piece AS p WHERE p.target_id = _leave_to_replay.target_id
$function$;
COMMENT ON FUNCTION tbl_repl._leave_to_replay(integer) IS
    'ends a background copy in pieces; replay goes on where it was';

-- _copy_failed(target_id, code, message): notes why a background copy has failed; whether the pieces are tried again.
-- Rows that the target rejects are left to replay, which finds them; a row that refers to one which is still queued
-- (23503) gets some time first.  SECURITY DEFINER, for the worker's role.
CREATE OR REPLACE FUNCTION tbl_repl._copy_failed(target_id integer, code text, message text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    tried integer;
    again boolean;
BEGIN
    PERFORM tbl_repl._log_error(target_id, NULL, code, message, NULL, NULL, NULL);
    SELECT st.failures INTO tried FROM tbl_repl.target_state AS st WHERE st.target_id = _copy_failed.target_id;
    again := tbl_repl._is_transient(code) OR (code = '23503' AND tried < 6);
    IF again THEN
        UPDATE tbl_repl.target_state AS st
        SET failures = least(st.failures + 1, 1000), next_try_at = clock_timestamp() + tbl_repl._retry_after(st.failures)
        WHERE st.target_id = _copy_failed.target_id;
    ELSE
        PERFORM tbl_repl._leave_to_replay(target_id);
    END IF;
    RETURN again;
END
$function$;
COMMENT ON FUNCTION tbl_repl._copy_failed(integer, text, text) IS
    'notes why a copy in the background has failed; whether its pieces are tried again';

CREATE OR REPLACE VIEW tbl_repl.copy_progress AS
SELECT p.target_id,
       count(*) AS pieces,
       count(*) FILTER (WHERE p.state = 'done') AS pieces_done,
       sum(p.rows_planned)::bigint AS rows_planned,
       sum(p.rows_copied)::bigint AS rows_copied,
       sum(p.bytes_copied)::bigint AS bytes_copied,
       min(p.started_at) AS started_at,
       round(sum(p.rows_copied) / nullif(extract(epoch FROM max(p.done_at) - min(p.started_at)), 0)) AS rows_per_second
FROM tbl_repl.piece AS p
GROUP BY p.target_id;
COMMENT ON VIEW tbl_repl.copy_progress IS 'copies in pieces that are under way or were interrupted';
