-- Queue: which rows of tbl_repl.change a target has still to get, and when they may go.
--
-- Each target has a position, a pg_snapshot: what is visible in it has been shipped, so that a transaction that commits
-- late, with a low number, is not overlooked.  Promises that nothing is removed that some target has not got; who moves a
-- position holds the lock ship of its target, or has the table locked against writers.

-- What was changed elsewhere is carried on to targets that take any origin, never back to where it was made.
CREATE OR REPLACE FUNCTION tbl_repl._takes_origin(target tbl_repl.target)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN target.forward = 'local' THEN ' AND c.origin IS NULL'
                WHEN target.remote ->> 'node' IS NULL THEN ''
                ELSE format(' AND c.origin IS DISTINCT FROM %L', target.remote ->> 'node') END
$function$;
COMMENT ON FUNCTION tbl_repl._takes_origin(tbl_repl.target) IS
    'SQL condition: row c of the queue was changed where the target may get it from';

-- The one row that tbl_repl.progress has for a target: no sequential scan and no sort, which would meet every version that
-- an old snapshot keeps, see there.
CREATE OR REPLACE FUNCTION tbl_repl._progress(target_id integer)
RETURNS tbl_repl.progress
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
SET enable_sort = off
SET plan_cache_mode = force_generic_plan
AS $function$
DECLARE
    progress tbl_repl.progress;
BEGIN
    SELECT * INTO progress FROM tbl_repl.progress AS p WHERE p.target_id = _progress.target_id ORDER BY p.turn DESC LIMIT 1;
    RETURN progress;
END
$function$;
COMMENT ON FUNCTION tbl_repl._progress(integer) IS 'how far a target is';

CREATE OR REPLACE FUNCTION tbl_repl._position(target_id integer) RETURNS pg_snapshot
LANGUAGE sql STABLE RETURN (tbl_repl._progress(target_id)).position;
COMMENT ON FUNCTION tbl_repl._position(integer) IS 'position of a target: everything visible in it has been shipped';

CREATE OR REPLACE FUNCTION tbl_repl._shipped_at(target_id integer) RETURNS timestamptz
LANGUAGE sql STABLE RETURN (tbl_repl._progress(target_id)).shipped_at;
COMMENT ON FUNCTION tbl_repl._shipped_at(integer) IS 'when a batch was last shipped to a target';

-- _advance(target_id, rows, passed): rows have been shipped, and the position is now passed (NULL: where it was).  Whoever
-- moves the position holds ship exclusively; pieces of a copy are counted side by side: who finds that another one has
-- moved the turn on meanwhile tries again.
CREATE OR REPLACE FUNCTION tbl_repl._advance(
    target_id integer,
    rows      bigint,
    passed    pg_snapshot DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $function$
BEGIN
    LOOP
        UPDATE tbl_repl.progress AS p
        SET position = coalesce(passed, p.position), batches = p.batches + 1, rows = p.rows + _advance.rows,
            shipped_at = CASE WHEN _advance.rows > 0 THEN clock_timestamp() ELSE p.shipped_at END
        WHERE p.target_id = _advance.target_id AND p.turn = (tbl_repl._progress(_advance.target_id)).turn;
        EXIT WHEN FOUND OR tbl_repl._position(target_id) IS NULL;
    END LOOP;
    UPDATE tbl_repl.target_state AS st SET next_try_at = NULL, failures = 0
    WHERE st.target_id = _advance.target_id AND (st.next_try_at IS NOT NULL OR st.failures > 0);
END
$function$;
COMMENT ON FUNCTION tbl_repl._advance(integer, bigint, pg_snapshot) IS 'notes how far a target is after a batch';

-- Pending rows of a target, as what follows FROM: rows meant for it that are not in its position.  The rule is written
-- out again where text would have to be planned anew each time, in _has_pending and, twice, in _small_batch, and in _rotate,
-- which asks for all targets at once.  Who changes it here changes it there; test_pending.py compares them.
CREATE OR REPLACE FUNCTION tbl_repl._pending_from(
    target   tbl_repl.target,
    passed   pg_snapshot,
    cut      xid8 DEFAULT NULL
)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('tbl_repl.change AS c WHERE c.source_id = %s AND %s AND (c.txid >= %L%s)%s%s',
                  target.source_id,
                  CASE WHEN target.mode = 'async' THEN format('(c.target_id IS NULL OR c.target_id = %s)', target.target_id)
                       ELSE format('c.target_id = %s', target.target_id) END,
                  pg_snapshot_xmax(passed),
                  (SELECT format(' OR c.txid = ANY (%L)', array_agg(x)) FROM pg_snapshot_xip(passed) AS x HAVING count(*) > 0),
                  ' AND c.txid <= ' || quote_literal(cut),
                  tbl_repl._takes_origin(target))
$function$;
COMMENT ON FUNCTION tbl_repl._pending_from(tbl_repl.target, pg_snapshot, xid8) IS
    'the queue rows of a target that its position does not contain, as text that follows FROM';

-- Asked all the time, so nothing is planned anew; the settings are for a plan that stays right when the queue
-- has grown.  The condition is that of _pending_from.
CREATE OR REPLACE FUNCTION tbl_repl._has_pending(target_id integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
SET plan_cache_mode = force_generic_plan
SET jit = off
AS $function$
DECLARE
    target record;
    floor  xid8;
    beside xid8[];
BEGIN
    SELECT t.source_id, t.mode, tbl_repl._position(t.target_id) AS position, t.forward = 'any' AS carries, t.remote ->> 'node' AS node INTO target
    FROM tbl_repl.target AS t
    WHERE t.target_id = _has_pending.target_id;
    floor := pg_snapshot_xmax(target.position);
    beside := ARRAY(SELECT pg_snapshot_xip(target.position));
    -- one by one: of a single expression both queries would be set up
    IF EXISTS (SELECT FROM tbl_repl.change AS c
               WHERE c.txid >= floor AND c.source_id = target.source_id
                 AND (c.target_id = _has_pending.target_id OR (c.target_id IS NULL AND target.mode = 'async'))
                 AND (c.origin IS NULL OR (target.carries AND c.origin IS DISTINCT FROM target.node)))
    THEN
        RETURN true;
    ELSIF beside = '{}' THEN
        RETURN false;
    END IF;
    RETURN EXISTS (SELECT FROM tbl_repl.change AS c
                   WHERE c.txid = ANY (beside) AND c.source_id = target.source_id
                     AND (c.target_id = _has_pending.target_id OR (c.target_id IS NULL AND target.mode = 'async'))
                     AND (c.origin IS NULL OR (target.carries AND c.origin IS DISTINCT FROM target.node)));
END
$function$;
COMMENT ON FUNCTION tbl_repl._has_pending(integer) IS 'whether anything is queued for a target';

-- A position means nothing in another cluster, where transactions count from elsewhere, nor in a copy of the database: what
-- is queued there is shipped from the start, which is right, for state may be shipped twice.
CREATE OR REPLACE FUNCTION tbl_repl._check_positions()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    here   record := tbl_repl._place();
    copied integer[];
BEGIN
    SELECT array_agg(st.target_id) INTO copied
    FROM tbl_repl.target_state AS st WHERE (st.system_identifier, st.database_id) <> (here.system_identifier, here.database_id);
    IF copied IS NULL THEN
        RETURN;
    END IF;
    -- numbers that are ahead of this cluster's would never be passed
    UPDATE tbl_repl.change SET txid = pg_current_xact_id();
    UPDATE tbl_repl.progress AS p SET position = '1:1:' WHERE p.target_id = ANY (copied);
    UPDATE tbl_repl.target_state AS st
    SET system_identifier = here.system_identifier, database_id = here.database_id, timeline = here.timeline
    WHERE st.target_id = ANY (copied);
END
$function$;
COMMENT ON FUNCTION tbl_repl._check_positions() IS
    'gives queue and positions that come from another cluster or database the numbers of this one';

-- The position after everything up to cut: what is still running, and what is pending beyond the cut,
-- stays outside.
CREATE OR REPLACE FUNCTION tbl_repl._position_after(
    old       pg_snapshot,
    snapshot  pg_snapshot,
    cut       xid8,
    remaining xid8[]
)
RETURNS pg_snapshot
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    WITH bound AS (
        SELECT greatest(pg_snapshot_xmax(old)::text::numeric, cut::text::numeric + 1) AS xmax
    ), outside AS (
        SELECT DISTINCT x::text::numeric AS x
        FROM (SELECT pg_snapshot_xip(snapshot) UNION SELECT unnest(remaining)) AS o (x), bound
        -- what is pending for a neighbour may have been shipped here before
        WHERE x::text::numeric < bound.xmax AND NOT pg_visible_in_snapshot(x, old)
    )
    SELECT format('%s:%s:%s', coalesce((SELECT min(x) FROM outside), xmax), xmax,
                  (SELECT string_agg(x::text, ',' ORDER BY x) FROM outside))::pg_snapshot
    FROM bound
$function$;
COMMENT ON FUNCTION tbl_repl._position_after(pg_snapshot, pg_snapshot, xid8, xid8[]) IS
    'position of a target after a batch that ends at a transaction';

-- Queues keys for one target as if they had been written, and lets everything for it queue behind them.
CREATE OR REPLACE FUNCTION tbl_repl._queue_keys(target tbl_repl.target, keys text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(tbl_repl._lock_queue(), target.target_id);
    INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count)
    SELECT h.segment, target.source_id, target.target_id, o.op, _queue_keys.keys, cardinality(_queue_keys.keys)
    FROM tbl_repl.queue_head AS h,
         -- as an operation that this target takes
         (SELECT CASE WHEN 'delete' = ANY (target.operations) THEN 'D' WHEN 'update' = ANY (target.operations) THEN 'U'
                      WHEN 'insert' = ANY (target.operations) THEN 'I' ELSE 'T' END::"char" AS op) AS o;
    UPDATE tbl_repl.target_state AS st SET status = 'queueing'
    WHERE st.target_id = target.target_id AND st.status = 'ok' AND target.mode <> 'async';
END
$function$;
COMMENT ON FUNCTION tbl_repl._queue_keys(tbl_repl.target, text[]) IS 'queues keys for one target';

-- Segments of the queue take turns.  The one that is not being filled is truncated when nobody needs it;
-- then the full one rests.  TRUNCATE gives the space back also while some transaction holds back vacuum.
-- Why nothing is lost: with the lock held no writer has rows in it that we cannot see.
CREATE OR REPLACE FUNCTION tbl_repl._rotate()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    head    smallint;
    resting regclass;
    needed  boolean;
BEGIN
    FOR turn IN 1 .. 2 LOOP
        SELECT h.segment INTO head FROM tbl_repl.queue_head AS h;
        resting := format('tbl_repl.change_%s', 1 - head)::regclass;
        IF pg_relation_size(resting) > 0 THEN
            BEGIN
                EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', resting);
                EXECUTE format('SELECT EXISTS (SELECT FROM %s AS c JOIN tbl_repl.target AS t ON t.source_id = c.source_id '
                               'JOIN (SELECT o.target_id, tbl_repl._position(o.target_id) AS position FROM tbl_repl.target AS o OFFSET 0) AS st ON st.target_id = t.target_id '
                               'WHERE (c.target_id = t.target_id OR (c.target_id IS NULL AND t.mode = ''async'')) '
                              'AND (c.origin IS NULL OR (t.forward = ''any'' AND c.origin IS DISTINCT FROM t.remote ->> ''node'')) '
                               'AND NOT pg_visible_in_snapshot(c.txid, st.position))', resting) INTO needed;
                IF needed THEN
                    RETURN;
                END IF;
                EXECUTE format('TRUNCATE %s', resting);
            EXCEPTION WHEN lock_not_available THEN
                RETURN;
            END;
        END IF;
        -- long lists of keys are kept beside the rows
        EXIT WHEN pg_table_size(format('tbl_repl.change_%s', head)::regclass) <= 1048576;
        UPDATE tbl_repl.queue_head AS h SET segment = 1 - head;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._rotate() IS 'empties the segment of the queue that everybody has passed';
