-- Replay: brings what is queued to the targets, and the targets back to ok.
--
-- Promises: a drainer works alone on a target, on committed state read after every direct shipper in
-- flight has ended; a row that a target rejects holds up no other (quarantine.sql); whatever
-- happens between the remote and the local commit, sending the same again is right.

-- replay(server, max_rows): ships one batch of what is queued for one server, in order of commit; a
-- transaction is not split.  Returns the number of changed rows handled, 0: nothing is left that can be shipped.
-- A target that cannot be reached is a WARNING, and kept for target_status and error_log.
-- Locks: ship, then queue of the server's targets, to the end of the transaction.
-- Errors: 25001 in a transaction that has written or is not READ COMMITTED; 42704; 22023.
-- SECURITY DEFINER: works on the private tables; connects and reads as each target's owner.
CREATE OR REPLACE FUNCTION tbl_repl.replay(
    server   name DEFAULT NULL,
    max_rows integer DEFAULT 10000
)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RETURN tbl_repl._replay(server, max_rows, true);
END
$function$;
COMMENT ON FUNCTION tbl_repl.replay(name, integer) IS
    'ships one batch of what is queued; returns the number of rows handled, 0 when nothing is left';

-- retry: whether rows in quarantine get another chance once nothing else is left, and targets that have
-- failed do not wait for their next try.  copies: targets whose copy in the background is made here; NULL: all.
-- leave_large: -1 instead of a batch that is not small, which the worker may have a better way for.
CREATE OR REPLACE FUNCTION tbl_repl._replay(
    server   name,
    max_rows integer,
    retry    boolean,
    copies   integer[] DEFAULT NULL,
    leave_large boolean DEFAULT false
)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $function$
DECLARE
    lane    record;
    began   timestamptz;
    handled bigint;
BEGIN
    IF pg_current_xact_id_if_assigned() IS NOT NULL OR current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'active_sql_transaction',
            MESSAGE = 'replay cannot run in a transaction that has already written or is not READ COMMITTED',
            DETAIL  = 'It ships what is committed, read after writers in flight have ended.',
            HINT    = CASE WHEN current_setting('default_transaction_isolation') = 'read committed' THEN 'Call it in a transaction of its own.'
                           ELSE 'Call it in a transaction of its own, after SET default_transaction_isolation = ''read committed'';' END;
    ELSIF coalesce(max_rows, 0) < 1 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'the number of rows of a batch must be at least 1';
    ELSIF NOT EXISTS (SELECT FROM pg_foreign_server AS f WHERE f.srvname = _replay.server) AND _replay.server IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = format('server %I does not exist', _replay.server),
            HINT    = 'Those that have targets: SELECT DISTINCT server FROM tbl_repl.target_status;';
    END IF;
    PERFORM tbl_repl._check_positions();
    PERFORM tbl_repl._purge_tombstones();
    IF extract(microseconds FROM clock_timestamp())::integer % 64 = 0 THEN
        PERFORM tbl_repl._sum_up_shipped();
    END IF;
    PERFORM tbl_repl._resolve_receipts(server, retry);
    -- Those that failed last come last: one bad target must not keep the others waiting.  A failed one has
    -- a turn of its own, or its backlog would fill the batches of its neighbours.  Where nothing is queued,
    -- there is only a status to settle or a quarantine to try: last, for their locks are held to the end.
    -- Async targets come along with nothing queued yet: what commits until the snapshot is taken is shipped
    -- for all of them or for none.  Their writers never wait for our locks.
    FOR lane IN
        SELECT array_agg(w.target_id ORDER BY w.target_id) AS targets, array_agg(w.target_id ORDER BY w.target_id) FILTER (WHERE w.is_due) AS due, bool_or(w.queued OR q.tries) AS has_work
        FROM (SELECT t.target_id, t.server, t.owner, t.timeout, t.mode, st.status, st.last_error_at, tbl_repl._shipped_at(t.target_id) AS last_shipped_at,
                     CASE WHEN st.copy_after IS NULL THEN tbl_repl._has_pending(t.target_id)
                          ELSE coalesce(t.target_id = ANY (copies), true) END AS queued, d.is_due,
                     -- that of a connection that was lost is over as soon as anybody tries it
                     d.is_due OR st.status <> 'failed' AND st.last_error ~ '^(08|57P)'
                                 AND bool_or(d.is_due AND st.status <> 'failed') OVER (PARTITION BY t.server, t.owner, t.timeout) AS comes_along
              FROM tbl_repl.target AS t JOIN tbl_repl.target_state AS st USING (target_id)
              CROSS JOIN LATERAL (SELECT retry OR tbl_repl._seconds_until(st.next_try_at) = 0 AS is_due) AS d
              WHERE (_replay.server IS NULL OR t.server = _replay.server) AND tbl_repl._may_replay(st)) AS w
        CROSS JOIN LATERAL (SELECT retry AND EXISTS (SELECT FROM tbl_repl.quarantined AS q WHERE q.target_id = w.target_id) AS tries) AS q
        WHERE w.comes_along AND (w.queued OR w.status <> 'ok' OR q.tries OR w.mode = 'async')
        GROUP BY w.server, w.owner, w.timeout, CASE WHEN w.status = 'failed' THEN w.target_id END
        HAVING bool_or(w.is_due AND (w.queued OR w.status <> 'ok' OR q.tries))
        ORDER BY bool_or(w.queued) DESC, bool_or(q.tries) DESC,
                 max(w.last_error_at) FILTER (WHERE w.last_error_at > coalesce(w.last_shipped_at, '-infinity')) NULLS FIRST,
                 min(w.last_shipped_at) NULLS FIRST, min(w.target_id)
    LOOP
        began := clock_timestamp();
        handled := tbl_repl._replay_lane(lane.targets, lane.has_work, max_rows, retry, copies, leave_large);
        IF handled = 0 AND lane.due <> lane.targets
           AND EXISTS (SELECT FROM tbl_repl.target_state AS st
                       WHERE st.target_id = ANY (lane.targets) AND st.last_error_at > began AND st.last_error ~ '^(08|57P)') THEN
            -- lost again: perhaps a row of one that has come along ends the session there each time
            handled := tbl_repl._replay_lane(lane.due, lane.has_work, max_rows, retry, copies, leave_large);
        END IF;
        IF handled < 0 THEN
            RETURN handled;
        ELSIF handled > 0 THEN
            PERFORM tbl_repl._rotate();
            RETURN handled;
        END IF;
    END LOOP;
    RETURN 0;
END
$function$;
COMMENT ON FUNCTION tbl_repl._replay(name, integer, boolean, integer[], boolean) IS
    'replay, with or without another try of what is in quarantine; SECURITY DEFINER as replay';

-- Not while it is paused.  While it is being copied only the copy goes on: a piece read earlier could be applied later.
CREATE OR REPLACE FUNCTION tbl_repl._may_replay(state tbl_repl.target_state)
RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT state.status <> 'paused'
$function$;
COMMENT ON FUNCTION tbl_repl._may_replay(tbl_repl.target_state) IS 'whether replay may ship to a target now';

-- drain(server, batch_rows): replay until nothing is left, COMMIT after each batch.  A procedure with
-- a SET clause or SECURITY DEFINER could not commit: hence this thin shell, in which every name is qualified.
CREATE OR REPLACE PROCEDURE tbl_repl.drain(
    server     name DEFAULT NULL,
    batch_rows integer DEFAULT 10000
)
LANGUAGE plpgsql
AS $procedure$
DECLARE
    handled bigint;
BEGIN
    LOOP
        handled := tbl_repl.replay(drain.server, drain.batch_rows);
        COMMIT;
        EXIT WHEN handled OPERATOR(pg_catalog.=) 0;
    END LOOP;
END
$procedure$;
COMMENT ON PROCEDURE tbl_repl.drain(name, integer) IS
    'replays until nothing is left that can be shipped, commits after each batch';

-- _open_batch(targets, max_rows): what there is to do for the targets behind one connection: whole transactions
-- up to max_rows.  variants: a cursor that opens the stream of their state, see _stream.
-- STABLE: all of it, also what the cursors read later, is in the snapshot of the statement that calls.  Were
-- the state read later than the list, a table that is not in the list would stay behind the others.
CREATE OR REPLACE FUNCTION tbl_repl._open_batch(
    targets  integer[],
    max_rows integer,
    OUT snapshot  pg_snapshot,
    OUT cut       xid8,
    OUT rows      bigint,
    OUT complete  boolean,
    OUT ops       jsonb,
    OUT remaining xid8[],
    OUT loads     tbl_repl.load[],
    OUT variants  refcursor
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
#variable_conflict use_column
DECLARE
    listing text;
BEGIN
    SELECT format($query$
            WITH q AS MATERIALIZED (%s),
            per AS (SELECT q.txid, sum(q.row_count) AS n FROM q GROUP BY q.txid),
            run AS (SELECT per.txid, sum(per.n) OVER (ORDER BY per.txid) AS total, row_number() OVER (ORDER BY per.txid) AS i FROM per),
            cut AS (SELECT run.txid, run.total, run.i FROM run WHERE run.total <= $1 OR run.i = 1 ORDER BY run.i DESC LIMIT 1)
            SELECT pg_current_snapshot() AS snapshot, cut.txid AS cut, cut.total AS rows,
                   cut.i = (SELECT count(*) FROM run) AS complete,
                   (SELECT jsonb_object_agg(o.target_id, o.ops) FROM (
                        SELECT q.target_id, jsonb_agg(DISTINCT CASE WHEN q.op = 'T' AND NOT q.whole THEN 't' ELSE q.op::text END) AS ops
                        FROM q WHERE q.txid <= cut.txid GROUP BY q.target_id) AS o) AS ops,
                   (SELECT array_agg(run.txid) FROM run WHERE run.txid > cut.txid) AS remaining
            FROM cut RIGHT JOIN (SELECT) AS one ON true$query$,
            coalesce(string_agg(format('SELECT %s AS target_id, c.txid, c.op, c.keys IS NULL AS whole, c.row_count FROM %s',
                                       t.target_id, tbl_repl._pending_from(t, tbl_repl._position(t.target_id))), ' UNION ALL '),
                     'SELECT 0 AS target_id, c.txid, c.op, true AS whole, c.row_count FROM tbl_repl.change AS c WHERE false'))
    INTO listing
    FROM tbl_repl.target AS t JOIN tbl_repl.target_state AS st USING (target_id)
    WHERE t.target_id = ANY (targets) AND st.copy_after IS NULL;
    EXECUTE listing INTO snapshot, cut, rows, complete, ops, remaining USING max_rows;
    loads := '{}';
    IF cut IS NULL THEN
        RETURN;
    END IF;
    SELECT coalesce(array_agg(l), '{}') INTO loads
    FROM tbl_repl.target AS t
    JOIN tbl_repl.target_state AS st USING (target_id)
    CROSS JOIN LATERAL (SELECT array_agg(o::"char") AS found FROM jsonb_array_elements_text(_open_batch.ops -> t.target_id::text) AS o WHERE o <> 't') AS o
    CROSS JOIN LATERAL tbl_repl._loads_by_origin(t, o.found,
        tbl_repl._pending_from(t, tbl_repl._position(t.target_id), CASE WHEN NOT _open_batch.complete THEN _open_batch.cut END)) AS l
    WHERE t.target_id = ANY (targets) AND st.copy_after IS NULL AND _open_batch.ops ? t.target_id::text;
    OPEN variants FOR
        SELECT v.variant, tbl_repl._open_stream(_open_batch.loads, false, v.variant)
        FROM unnest(tbl_repl._variants()) WITH ORDINALITY AS v (variant, n) ORDER BY v.n;
END
$function$;
COMMENT ON FUNCTION tbl_repl._open_batch(integer[], integer) IS
    'what is queued for some targets, and the state of its rows in the same snapshot';

-- _replay_lane(targets, has_work, max_rows, retry, copies, leave_large): one batch for the targets behind one connection;
-- has_work: whether there is something to ship, or only a status to settle.
-- Connects before it locks: who writes is not turned away for a server that is out of reach.
CREATE OR REPLACE FUNCTION tbl_repl._replay_lane(
    targets  integer[],
    has_work boolean,
    max_rows integer,
    retry    boolean,
    copies   integer[],
    leave_large boolean
)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    lane      record;
    batch     record;
    loads     tbl_repl.load[] := '{}';
    copied    record;
    retrying  boolean;
    handled   bigint;
    old_limit text := current_setting('lock_timeout');
    failure   record;
    locked    integer[];
    paged     integer[];
    small     record;
    sent      boolean;
    error_text   text;
    error_detail text;
    error_hint   text;
BEGIN
    SELECT t.target_id, t.server, t.timeout, tbl_repl._connection_name(t.server, t.owner, t.timeout) AS conn
    INTO lane FROM tbl_repl.target AS t WHERE t.target_id = targets[1];
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    paged := ARRAY(SELECT st.target_id FROM tbl_repl.target_state AS st
                   WHERE st.target_id = ANY (targets) AND st.copy_after IS NOT NULL
                     AND coalesce(st.target_id = ANY (copies), true) AND tbl_repl._take_over_copy(st.target_id));
    IF has_work THEN
        BEGIN
            -- one that was used a moment ago need not be asked: were it dead, we would only wait longer
            IF NOT EXISTS (SELECT FROM unnest(targets) AS t WHERE tbl_repl._shipped_at(t) > clock_timestamp() - interval '1 second') THEN
                PERFORM tbl_repl._is_alive(lane.conn, clock_timestamp() + lane.timeout);
            END IF;
            -- twice the timeout: an older session of ours may have to be outlived first
            PERFORM tbl_repl._connect(lane.target_id, lane.conn, clock_timestamp() + lane.timeout * 2);
        EXCEPTION WHEN assert_failure OR OTHERS THEN
            GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT;
            PERFORM tbl_repl._lane_is_down(lane.server, targets, SQLSTATE, error_text, error_detail, error_hint);
            RETURN 0;
        END;
    END IF;

    -- Exclusive: waits for shippers in flight, turns new ones to the queue already while it waits.
    PERFORM set_config('lock_timeout', (ceil(extract(epoch FROM lane.timeout) * 2000))::text, true);
    BEGIN
        PERFORM pg_advisory_xact_lock(tbl_repl._lock_ship(), t) FROM unnest(targets) AS t;
    EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
        -- a deadlock: with another drainer that has come here the other way round
        PERFORM set_config('lock_timeout', old_limit, true);
        RAISE WARNING USING
            ERRCODE = 'lock_not_available',
            MESSAGE = format('targets on server %I are in use, nothing replayed', lane.server);
        RETURN 0;
    END;
    PERFORM set_config('lock_timeout', old_limit, true);
    -- paused or dropped while we waited
    SELECT array_agg(st.target_id ORDER BY st.target_id) INTO targets
    FROM tbl_repl.target_state AS st WHERE st.target_id = ANY (targets) AND tbl_repl._may_replay(st);
    -- only now: who pauses takes ship first, too
    PERFORM tbl_repl._leave_to_replay(t) FROM unnest(paged) AS t WHERE t = ANY (targets);
    IF EXISTS (SELECT FROM tbl_repl.target AS t WHERE t.target_id = ANY (targets) AND t.on_conflict = 'newest') THEN
        targets := tbl_repl._cut_off_too_long(targets);
    END IF;
    IF targets IS NULL THEN
        RETURN 0;
    END IF;

    -- before the snapshot: its cursors lock what they read
    locked := tbl_repl._lock_sources(ARRAY(SELECT st.target_id FROM tbl_repl.target_state AS st
                                           WHERE st.target_id = ANY (targets)
                                             AND (st.target_id = ANY (paged) OR tbl_repl._has_pending(st.target_id))
                                           ORDER BY st.target_id), lane.timeout);
    IF cardinality(locked) > 0 THEN
        targets := ARRAY(SELECT x FROM unnest(targets) AS x WHERE x <> ALL (locked));
        RETURN CASE WHEN cardinality(targets) = 0 THEN 0 ELSE tbl_repl._replay_lane(targets, true, max_rows, retry, copies, leave_large) END;
    END IF;

    IF cardinality(paged) = 0 THEN
        BEGIN
            small := tbl_repl._small_batch(targets, max_rows);
        EXCEPTION WHEN assert_failure OR OTHERS THEN
            -- some expression fails on a row: the long way finds out on which
            SELECT NULL::text AS message, NULL::pg_snapshot AS snapshot, NULL::bigint AS rows, NULL::integer[] AS shipped, NULL::bigint[] AS counts,
                   false AS is_large INTO small;
        END;
        IF small.message IS NOT NULL THEN
            BEGIN
                sent := tbl_repl._apply_at_once(small.shipped, lane.conn, small.message, lane.timeout);
            EXCEPTION WHEN assert_failure OR OTHERS THEN
                GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT;
                PERFORM tbl_repl._lane_is_down(lane.server, small.shipped, SQLSTATE, error_text, error_detail, error_hint);
                RETURN 0;
            END;
            IF sent THEN
                PERFORM tbl_repl._advance(u.target_id, u.keys, small.snapshot) FROM unnest(small.shipped, small.counts) AS u (target_id, keys);
                PERFORM tbl_repl._back_to_ok(t) FROM unnest(targets) AS t;
                RETURN small.rows;
            END IF;
        ELSIF leave_large AND small.is_large THEN
            RETURN -1;
        END IF;
    END IF;

    batch := tbl_repl._open_batch(targets, max_rows);
    loads := batch.loads;
    handled := coalesce(batch.rows, 0);

    copied := tbl_repl._next_pages(targets, paged, max_rows);
    loads := loads || copied.loads;
    handled := handled + copied.rows;
    -- Nothing else to do: what is in quarantine gets another chance.
    retrying := retry AND cardinality(loads) = 0 AND batch.cut IS NULL;
    IF retrying THEN
        loads := tbl_repl._quarantine_loads(targets, max_rows);
    END IF;

    SELECT '{}'::integer[] AS broken INTO failure;
    IF cardinality(loads) > 0 THEN
        failure := tbl_repl._apply(lane.target_id, lane.conn, lane.timeout, loads,
                                   tbl_repl._is_torn(ARRAY(SELECT l.target_id FROM unnest(loads) AS l), batch.cut IS NOT NULL OR cardinality(paged) > 0),
                                   -- pages were read later
                                   CASE WHEN loads = batch.loads THEN batch.variants END);
        IF failure.code IS NOT NULL THEN
            PERFORM tbl_repl._lane_is_down(lane.server, ARRAY(SELECT DISTINCT u.target_id FROM unnest(loads) AS u),
                                           failure.code, failure.message, failure.detail, failure.hint);
            RETURN 0;
        END IF;
        IF retrying THEN
            handled := failure.shipped;
        ELSIF NOT EXISTS (SELECT FROM unnest(loads) AS u WHERE u.target_id <> ALL (failure.broken)) THEN
            RAISE WARNING USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('server %I: targets %s have failed, see tbl_repl.target_status', lane.server, array_to_string(failure.broken, ', ')),
                DETAIL  = 'Their changes stay queued.';
            -- they have filled the batch; the others still have theirs
            RETURN tbl_repl._replay_lane(ARRAY(SELECT x FROM unnest(targets) AS x WHERE x <> ALL (failure.broken)), true, max_rows, retry, copies, leave_large);
        END IF;
        PERFORM tbl_repl._advance(u.target_id, (failure.by_target ->> u.target_id::text)::bigint)
        FROM (SELECT DISTINCT l.target_id FROM unnest(loads) AS l) AS u
        WHERE (failure.by_target ->> u.target_id::text)::bigint > 0;
    END IF;

    -- what had failed takes rows again
    UPDATE tbl_repl.target_state AS st SET status = CASE WHEN st.copy_after IS NULL THEN 'queueing' ELSE 'copying' END
    WHERE st.target_id IN (SELECT u.target_id FROM unnest(loads) AS u) AND st.target_id <> ALL (failure.broken) AND st.status = 'failed';

    -- Positions move with this transaction; were it lost now, the same would be sent again.
    IF batch.cut IS NOT NULL THEN
        PERFORM tbl_repl._advance(u.target_id, 0, CASE WHEN batch.complete THEN batch.snapshot ELSE
                    tbl_repl._position_after(tbl_repl._position(u.target_id), batch.snapshot, batch.cut, batch.remaining) END)
        FROM (SELECT o::integer AS target_id FROM jsonb_object_keys(batch.ops) AS o) AS u
        WHERE u.target_id <> ALL (coalesce(failure.broken, '{}'));
    END IF;
    IF tbl_repl._note_pages(copied.pages, max_rows, failure.broken) AND handled = 0 THEN
        handled := 1;  -- a copy has ended; what was queued meanwhile is next
    END IF;

    IF coalesce(batch.complete, true) THEN
        PERFORM tbl_repl._back_to_ok(t) FROM unnest(targets) AS t
        WHERE t <> ALL (coalesce(failure.broken, '{}'));
    END IF;
    RETURN handled;
END
$function$;
COMMENT ON FUNCTION tbl_repl._replay_lane(integer[], boolean, integer, boolean, integer[], boolean) IS
    'ships one batch to the targets behind one connection';

-- _next_pages(targets, paged, max_rows): the initial copy in the background, as far as it is made here (paged): the next
-- page of each target, referenced tables first; what is queued comes after it.
--   pages: {"target_id": [key, ...]}, for _note_pages; rows: how many keys
CREATE OR REPLACE FUNCTION tbl_repl._next_pages(
    targets  integer[],
    paged    integer[],
    max_rows integer,
    OUT loads tbl_repl.load[],
    OUT pages jsonb,
    OUT rows  bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item record;
    page text[];
BEGIN
    loads := '{}';
    pages := '{}';
    rows := 0;
    FOR item IN
        SELECT t.target_id, st.copy_after, s.fk_rank, tbl_repl._chunk_rows(s.source_table) AS chunk
        FROM tbl_repl.target AS t JOIN tbl_repl.target_state AS st USING (target_id) JOIN tbl_repl.source AS s USING (source_id)
        WHERE t.target_id = ANY (targets) AND t.target_id = ANY (paged) AND st.copy_after IS NOT NULL
          AND s.fk_rank = (SELECT min(so.fk_rank) FROM tbl_repl.target AS o JOIN tbl_repl.target_state AS os USING (target_id)
                           JOIN tbl_repl.source AS so USING (source_id)
                           WHERE o.target_id = ANY (targets) AND os.copy_after IS NOT NULL)
    LOOP
        EXECUTE format('SELECT tbl_repl.page_%s($1, $2)', item.target_id) INTO page USING item.copy_after[1], max_rows;
        pages := jsonb_set(pages, ARRAY[item.target_id::text], to_jsonb(coalesce(page, '{}')));
        IF page IS NOT NULL THEN
            rows := rows + cardinality(page);
            loads := array_append(loads, ROW(item.target_id, item.fk_rank, format(
                'SELECT array_agg(e.k) AS keys FROM unnest(%L::text[]) WITH ORDINALITY AS e (k, n) GROUP BY (e.n - 1) / %s ORDER BY (e.n - 1) / %s',
                page, item.chunk, item.chunk), true, false, NULL)::tbl_repl.load);
        END IF;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._next_pages(integer[], integer[], integer) IS 'what comes next of copies in the background';

-- _note_pages(pages, max_rows, broken): the pages are on the target, but for those of broken targets; whether a copy has ended.
CREATE OR REPLACE FUNCTION tbl_repl._note_pages(pages jsonb, max_rows integer, broken integer[])
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item  record;
    ended boolean := false;
BEGIN
    FOR item IN SELECT p.key::integer AS target_id, jsonb_array_length(p.value) AS n, p.value ->> -1 AS last FROM jsonb_each(pages) AS p LOOP
        CONTINUE WHEN item.target_id = ANY (coalesce(broken, '{}'));
        UPDATE tbl_repl.target_state AS st
        SET copy_after = CASE WHEN item.n < max_rows THEN NULL ELSE ARRAY[item.last] END,
            rows_copied = st.rows_copied + item.n,
            status = CASE WHEN item.n < max_rows AND st.status = 'copying' THEN 'queueing' ELSE st.status END
        WHERE st.target_id = item.target_id;
        ended := ended OR item.n < max_rows;
    END LOOP;
    RETURN ended;
END
$function$;
COMMENT ON FUNCTION tbl_repl._note_pages(jsonb, integer, integer[]) IS 'notes how far copies in the background are';

-- _small_batch(targets, max_rows): what is queued for some targets, when it is little and nothing special: the statements
-- that bring it, for one message.  Nothing is planned anew, for most batches are small.
--   message: NULL when it is not so; is_large: because there are too many rows
--   shipped, counts: the targets that it is for, and the number of keys of each
-- STABLE: queue and rows are read in the snapshot of the statement that calls, so that what another transaction does
-- to several tables is shipped for all of them or for none.
CREATE OR REPLACE FUNCTION tbl_repl._small_batch(
    targets  integer[],
    max_rows integer,
    OUT message  text,
    OUT snapshot pg_snapshot,
    OUT rows     bigint,
    OUT shipped  integer[],
    OUT counts   bigint[],
    OUT is_large boolean
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
SET plan_cache_mode = force_generic_plan
SET jit = off
AS $function$
DECLARE
    item     record;
    floor    xid8;
    beside   xid8[];
    total    bigint;
    lines    bigint;
    plain    boolean;
    keys     text[];
    rendered record;
    deletes  text[] := '{}';
    upserts  text[] := '{}';
    cascades boolean := false;
BEGIN
    snapshot := pg_current_snapshot();
    rows := 0;
    shipped := '{}';
    counts := '{}';
    is_large := false;
    FOR item IN
        SELECT t.target_id, t.source_id, t.mode, t.forward, t.remote ->> 'node' AS node, tbl_repl._position(t.target_id) AS position, st.status, s.source_table, t.cascades,
               t.on_conflict = 'overwrite' AND t.operations @> '{insert,update,delete,truncate}'
               AND NOT EXISTS (SELECT FROM tbl_repl.quarantined AS q WHERE q.target_id = t.target_id) AS plain
        FROM tbl_repl.target AS t
        JOIN tbl_repl.target_state AS st ON st.target_id = t.target_id
        JOIN tbl_repl.source AS s ON s.source_id = t.source_id
        WHERE t.target_id = ANY (targets) AND st.copy_after IS NULL
        ORDER BY s.fk_rank, t.target_id
    LOOP
        floor := pg_snapshot_xmax(item.position);
        beside := ARRAY(SELECT pg_snapshot_xip(item.position));
        SELECT sum(c.row_count), count(*), bool_and(c.op <> 'T' AND c.origin IS NULL) INTO total, lines, plain
        FROM (SELECT c.row_count, c.op, c.origin FROM tbl_repl.change AS c
              WHERE (c.txid >= floor OR c.txid = ANY (beside)) AND c.source_id = item.source_id
                AND (c.target_id = item.target_id OR (c.target_id IS NULL AND item.mode = 'async'))
                AND (c.origin IS NULL OR item.forward <> 'local' AND c.origin IS DISTINCT FROM item.node)
              LIMIT 1001) AS c;
        CONTINUE WHEN lines = 0;
        rows := rows + total;
        IF lines > 1000 OR rows > least(max_rows, 1000) OR total > 1 AND total > tbl_repl._chunk_rows(item.source_table) THEN
            is_large := true;
            RETURN;
        ELSIF NOT plain OR NOT item.plain OR item.status = 'failed' THEN
            RETURN;
        END IF;
        -- in the order in which everybody locks
        SELECT array_agg(DISTINCT k COLLATE "C") INTO keys
        FROM tbl_repl.change AS c, unnest(c.keys) AS k
        WHERE (c.txid >= floor OR c.txid = ANY (beside)) AND c.source_id = item.source_id
          AND (c.target_id = item.target_id OR (c.target_id IS NULL AND item.mode = 'async')) AND c.origin IS NULL;
        EXECUTE format('SELECT r.deletes, r.upserts FROM tbl_repl.render_%s($1, false, true, ''prepared'') AS r', item.target_id)
        INTO rendered USING keys;
        -- deletions from those that refer to others, rows to those that are referred to; which first: see _next_variant
        deletes := array_prepend(rendered.deletes, deletes);
        upserts := array_append(upserts, rendered.upserts);
        cascades := cascades OR item.cascades;
        shipped := array_append(shipped, item.target_id);
        counts := array_append(counts, cardinality(keys)::bigint);
    END LOOP;
    IF shipped <> '{}' AND NOT (cascades AND array_remove(deletes, NULL) <> '{}' AND tbl_repl._is_torn(targets)) THEN
        message := array_to_string(array_remove(CASE WHEN cascades THEN upserts || deletes ELSE deletes || upserts END, NULL), '; ');
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._small_batch(integer[], integer) IS
    'what is queued for some targets as one message, where that is little';

-- A small batch: everything in one message, then the commit: a drainer that ends while the target works, or
-- gives up, must leave nothing behind that takes effect by itself.  False: the target has refused it, and nothing of it has
-- happened; the long way finds out what is to be done.  A connection that turns out to be dead before the commit was
-- sent is opened anew, once; what it has not prepared is prepared when it says so.
-- Errors: those of the connection, and a cancel.
CREATE OR REPLACE FUNCTION tbl_repl._apply_at_once(
    targets integer[],
    conn    text,
    message text,
    timeout interval
)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    started  timestamptz := clock_timestamp();
    anew     boolean := false;
    prepares boolean := false;
    context  text;
BEGIN
    IF message = '' THEN
        RETURN true;
    END IF;
    LOOP
        BEGIN
            PERFORM tbl_repl._connect(targets[1], conn, clock_timestamp() + timeout * 2);
            IF prepares THEN
                PERFORM tbl_repl._prepare_again(conn, targets, clock_timestamp() + timeout);
            END IF;
            -- of a single statement the end is the end of all, and the commit checks what is deferred
            PERFORM tbl_repl._send(conn, CASE WHEN strpos(message, ';') = 0 THEN 'BEGIN; ' || message
                ELSE format('BEGIN; SET CONSTRAINTS ALL DEFERRED; %s; SET CONSTRAINTS ALL IMMEDIATE', message) END);
            PERFORM tbl_repl._receive(conn, clock_timestamp() + timeout * 2, false, true);
            EXIT;
        EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
            GET STACKED DIAGNOSTICS context = PG_EXCEPTION_CONTEXT;
            IF SQLSTATE ~ '^(08|57P)' THEN
                IF anew OR clock_timestamp() > started + timeout THEN
                    RAISE;
                END IF;
                anew := true;
            ELSIF SQLSTATE = '26000' AND NOT prepares THEN
                PERFORM tbl_repl._call(conn, 'ROLLBACK', clock_timestamp() + timeout);
                prepares := true;
                CONTINUE;
            ELSIF SQLSTATE <> '57014' OR tbl_repl._is_too_slow(SQLSTATE, context, conn) THEN
                PERFORM tbl_repl._call(conn, 'ROLLBACK', clock_timestamp() + timeout);
                RETURN false;
            ELSE
                -- this session goes on, and must not find a remote transaction open
                IF conn = ANY (tbl_repl._dblink_connections()) THEN
                    PERFORM tbl_repl._dblink_disconnect(conn);
                END IF;
                RAISE;
            END IF;
        END;
        IF conn = ANY (tbl_repl._dblink_connections()) THEN
            PERFORM tbl_repl._dblink_disconnect(conn);
        END IF;
    END LOOP;
    BEGIN
        PERFORM tbl_repl._commit(conn, timeout);
    EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
        GET STACKED DIAGNOSTICS context = PG_EXCEPTION_CONTEXT;
        IF SQLSTATE ~ '^(08|57P)' OR (SQLSTATE = '57014' AND NOT tbl_repl._is_too_slow(SQLSTATE, context, conn)) THEN
            RAISE;
        END IF;
        -- the lease was over, or a deferred check has failed: not committed
        PERFORM tbl_repl._call(conn, 'ROLLBACK', clock_timestamp() + timeout);
        RETURN false;
    END;
    RETURN true;
END
$function$;
COMMENT ON FUNCTION tbl_repl._apply_at_once(integer[], text, text, interval) IS
    'ships a small batch; whether the target has taken it';

-- Locks the targets' source tables for reading, to the end of the transaction; returns the targets that are
-- locked out.  An open TRUNCATE or an ALTER TABLE may hold a table for as long as its transaction likes, and may
-- itself wait for the lock ship that we hold: so we wait for a part of timeout only, and once, before anything is
-- sent.  Nothing that is read later has to wait, and the neighbours of such a table go on without it.
CREATE OR REPLACE FUNCTION tbl_repl._lock_sources(targets integer[], timeout interval)
RETURNS integer[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target_id integer;
    old_limit text := current_setting('lock_timeout');
    locked    integer[] := '{}';
BEGIN
    PERFORM set_config('lock_timeout', least(1000, ceil(extract(epoch FROM timeout) * 250))::text, true);
    FOREACH target_id IN ARRAY targets LOOP
        BEGIN
            -- who owns the target may read the table, we may not
            EXECUTE format('SELECT tbl_repl.page_%s(NULL, 0)', target_id);
        EXCEPTION
            WHEN lock_not_available OR deadlock_detected THEN
                locked := array_append(locked, target_id);
            WHEN assert_failure OR OTHERS THEN
                NULL;  -- what else is wrong is found out, and told, where the rows are read
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', old_limit, true);
    FOREACH target_id IN ARRAY locked LOOP
        PERFORM tbl_repl._log_error(target_id, NULL, '55P03', 'the table is locked on the source', 'Another transaction holds it exclusively.',
                                    'Its changes stay queued, and are shipped by the next replay after that transaction.', NULL);
        RAISE WARNING USING
            ERRCODE = 'lock_not_available',
            MESSAGE = format('target %s: the table is locked on the source', target_id),
            DETAIL  = 'Another transaction holds it exclusively.',
            HINT    = 'Its changes stay queued, and are shipped by the next replay after that transaction.';
    END LOOP;
    RETURN locked;
END
$function$;
COMMENT ON FUNCTION tbl_repl._lock_sources(integer[], interval) IS
    'locks the source tables of targets for reading, bounded; returns those that are locked by others';

CREATE OR REPLACE FUNCTION tbl_repl._lane_is_down(
    server  name,
    targets integer[],
    code    text,
    message text,
    detail  text,
    hint    text
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    PERFORM tbl_repl._log_error(t, NULL, code, message, detail, hint, NULL) FROM unnest(targets) AS t;
    RAISE WARNING USING
        ERRCODE = code,
        MESSAGE = CASE WHEN strpos(message, format('server %I', server)) > 0 THEN message ELSE format('server %I: %s', server, message) END,
        DETAIL  = coalesce(nullif(detail, ''), 'Its changes stay queued.'),
        HINT    = coalesce(nullif(hint, ''), 'They are shipped by the next replay that reaches it.');
END
$function$;
COMMENT ON FUNCTION tbl_repl._lane_is_down(name, integer[], text, text, text, text) IS
    'notes and reports that nothing could be shipped to a server';

-- Back to ok.  Holding ship, so that nobody ships: with queue held exclusively those that were queueing
-- have committed, and who comes now looks at the status once more when he has the lock.
CREATE OR REPLACE FUNCTION tbl_repl._back_to_ok(target_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    give_up timestamptz := clock_timestamp() + interval '1 second';
BEGIN
    IF NOT EXISTS (SELECT FROM tbl_repl.target_state AS st
                   WHERE st.target_id = _back_to_ok.target_id AND st.status IN ('queueing', 'failed') AND st.copy_after IS NULL) THEN
        RETURN;
    END IF;
    -- A prepared transaction may hold it for long: then the next replay tries again.
    WHILE NOT pg_try_advisory_xact_lock(tbl_repl._lock_queue(), target_id) LOOP
        IF clock_timestamp() > give_up THEN
            RETURN;
        END IF;
        PERFORM pg_sleep(0.001);
    END LOOP;
    IF NOT tbl_repl._has_pending(target_id) THEN
        UPDATE tbl_repl.target_state AS st SET status = 'ok' WHERE st.target_id = _back_to_ok.target_id;
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._back_to_ok(integer) IS
    'sets a drained target back to ok; the caller holds ship exclusively';

-- _apply(target_id, conn, timeout, loads, torn, variants): one remote transaction, in which rows that the target
-- rejects are found by halving and put into quarantine.  torn: so are deletions that would take along what waits elsewhere.
--   code, message, detail, hint: why nothing could be shipped at all, and trying again may help
--   shipped, by_target: number of keys that are now right there; broken: targets that need a person
CREATE OR REPLACE FUNCTION tbl_repl._apply(
    target_id integer,
    conn      text,
    timeout   interval,
    loads     tbl_repl.load[],
    torn      boolean,
    variants  refcursor,
    OUT code      text,
    OUT message   text,
    OUT detail    text,
    OUT hint      text,
    OUT shipped   bigint,
    OUT by_target jsonb,
    OUT broken    integer[]
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    halves     record;
    committing boolean := false;
    stubborn   text;
    context    text;
BEGIN
    broken := '{}';
    by_target := '{}';
    shipped := 0;
    BEGIN
        PERFORM tbl_repl._connect_alive(_apply.target_id, conn, clock_timestamp() + timeout * 2);
        BEGIN
            IF NOT torn THEN
                -- twice the timeout: it bounds each statement there, and a message may hold two
                by_target := tbl_repl._stream_any_way(conn, loads, false, timeout * 2, variants);
                committing := true;
                PERFORM tbl_repl._commit(conn, timeout);
                shipped := (SELECT sum(n::bigint) FROM jsonb_each_text(by_target) AS c (target_id, n));
                PERFORM tbl_repl._release(loads, '{}');
                RETURN;
            END IF;
        EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
            GET STACKED DIAGNOSTICS context = PG_EXCEPTION_CONTEXT;
            IF tbl_repl._is_transient(SQLSTATE) AND (committing OR NOT (tbl_repl._is_too_slow(SQLSTATE, context, conn)
                                                                        OR tbl_repl._is_stubborn(loads, SQLSTATE))) THEN
                RAISE;
            ELSIF tbl_repl._is_transient(SQLSTATE) AND SQLSTATE <> '57014' THEN
                stubborn := SQLSTATE;
            END IF;
            IF conn = ANY (tbl_repl._dblink_connections()) THEN
                PERFORM tbl_repl._dblink_disconnect(conn);
            END IF;
        END;
        PERFORM tbl_repl._connect(_apply.target_id, conn, clock_timestamp() + timeout * 2);
        halves := tbl_repl._apply_by_halves(conn, timeout, loads, stubborn);
        shipped := halves.shipped;
        by_target := halves.by_target;
        broken := halves.broken;
    EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
        GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL,
            hint = PG_EXCEPTION_HINT, context = PG_EXCEPTION_CONTEXT;
        -- this session goes on, and must not find a remote transaction open
        IF conn = ANY (tbl_repl._dblink_connections()) THEN
            PERFORM tbl_repl._dblink_disconnect(conn);
        END IF;
        IF code = '57014' AND NOT tbl_repl._is_too_slow(code, context, conn) THEN
            RAISE;
        END IF;
    END;
END
$function$;
COMMENT ON FUNCTION tbl_repl._apply(integer, text, interval, tbl_repl.load[], boolean, refcursor) IS
    'ships keys in one remote transaction, rejected rows go into quarantine';

CREATE OR REPLACE FUNCTION tbl_repl._target_failed(
    target_id integer,
    code      text,
    message   text
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    PERFORM tbl_repl._log_error(target_id, NULL, code, message, NULL,
                                format('Mend it, call tbl_repl.alter_target(%s) if columns have changed, then replay.', target_id), NULL);
    UPDATE tbl_repl.target_state AS st SET status = 'failed'
    WHERE st.target_id = _target_failed.target_id AND st.status <> 'paused';
END
$function$;
COMMENT ON FUNCTION tbl_repl._target_failed(integer, text, text) IS
    'notes that the definition of a target does not fit its table any more';
