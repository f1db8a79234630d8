-- Fan-out: one transaction to several servers at a time, all sync ones or none.
--
-- A lane is a connection, and what goes over it.  Promises one message and one wait for all lanes where a transaction
-- touches few rows, that no wait is longer than the lane's timeout, and that no sync target commits before
-- all of them have taken their rows.  What becomes of a lane that fails is the caller's business.

-- _ship_small(parcels, own, mine): one message a connection; sent to all, then waited for together.
-- Returns the targets that failed and may (tolerant); raises what a sync one says.
-- With a sync target among several connections, rows go first and the commits follow when all have
-- answered.  Where sync and tolerant targets share a connection and it fails, the tolerant ones are left out
-- and it is tried again.
CREATE OR REPLACE FUNCTION tbl_repl._ship_small(
    parcels tbl_repl.parcel[],
    own     xid8,
    mine    boolean
)
RETURNS integer[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    parcel    tbl_repl.parcel;
    lanes     tbl_repl.lane[] := '{}';
    lane      tbl_repl.lane;
    failed    integer[] := '{}';
    rendered  record;
    ready     tbl_repl.parcel[] := '{}';
    two_phase boolean;
    first_bad tbl_repl.lane;
    bad       boolean := false;
    finished  integer[] := '{}';
    error_detail text;
    n         integer;
BEGIN
    FOREACH parcel IN ARRAY parcels LOOP
        BEGIN
            rendered := tbl_repl._render_transaction(parcel.target_id, own, mine, 'prepared');
            parcel.deletes := nullif(rendered.deletes, '');
            parcel.upserts := nullif(rendered.upserts, '');
            parcel.rows := rendered.rows;
            IF parcel.rows > 0 THEN
                ready := array_append(ready, parcel);
            END IF;
        EXCEPTION WHEN assert_failure OR OTHERS THEN
            -- a filter or map that fails on a row, a column that is gone: the target's own business
            IF parcel.sync THEN
                GET STACKED DIAGNOSTICS error_detail = PG_EXCEPTION_DETAIL;
                PERFORM tbl_repl._raise_unreadable(parcel, SQLSTATE, SQLERRM, error_detail);
            END IF;
            PERFORM tbl_repl._log_error(parcel.target_id, NULL, SQLSTATE, SQLERRM, NULL, NULL, NULL);
            failed := array_append(failed, parcel.target_id);
        END;
    END LOOP;

    FOR lane IN
        SELECT p.conn, min(p.target_id), bool_or(p.sync), clock_timestamp() + min(p.timeout), 'new',
               array_agg(p ORDER BY p.target_id), NULL, NULL, NULL, NULL, NULL, NULL
        FROM unnest(ready) AS p GROUP BY p.conn ORDER BY 2
    LOOP
        lane.message := tbl_repl._first_message(lane.parcels);
        IF lane.message <> '' THEN
            lanes := array_append(lanes, lane);
        END IF;
    END LOOP;
    two_phase := cardinality(lanes) > 1 AND EXISTS (SELECT FROM unnest(lanes) AS l WHERE l.sync);

    -- Those that are connected first, for connecting may hang; it then costs its own time, not theirs.
    FOR n IN 1 .. cardinality(lanes) LOOP
        IF cardinality(lanes) = 1 OR tbl_repl._is_usable(lanes[n].conn) THEN
            lanes[n] := tbl_repl._lane_send(lanes[n], two_phase);
        END IF;
    END LOOP;
    FOR n IN 1 .. cardinality(lanes) LOOP
        IF lanes[n].state = 'new' THEN
            lane := lanes[n];
            lane.deadline := clock_timestamp() + (SELECT min(p.timeout) FROM unnest(lane.parcels) AS p);
            lanes[n] := tbl_repl._lane_send(lane, two_phase);
        END IF;
    END LOOP;
    FOR turn IN 1 .. cardinality(lanes) LOOP
        n := tbl_repl._next_lane(lanes, finished);
        finished := array_append(finished, n);
        lanes[n] := tbl_repl._lane_finish(lanes[n], own, mine, two_phase);
        IF lanes[n].state = 'failed' AND lanes[n].sync AND NOT bad THEN
            first_bad := lanes[n];
            bad := true;
        END IF;
    END LOOP;
    IF two_phase AND NOT bad THEN
        FOR n IN 1 .. cardinality(lanes) LOOP
            IF lanes[n].state = 'done' THEN
                lane := lanes[n];
                -- a hung neighbour may have used up the time
                lane.deadline := greatest(lane.deadline, clock_timestamp()
                    + (SELECT least(min(p.timeout) / 4, interval '1 second') FROM unnest(lane.parcels) AS p));
                BEGIN
                    PERFORM tbl_repl._send(lane.conn, 'SET CONSTRAINTS ALL IMMEDIATE' || tbl_repl._lease(lane.deadline) || '; COMMIT');
                    lane.state := 'committing';
                EXCEPTION WHEN assert_failure OR OTHERS THEN
                    lane := tbl_repl._lane_failed(lane, SQLSTATE, SQLERRM, NULL, NULL);
                END;
                lanes[n] := lane;
            END IF;
        END LOOP;
        FOR n IN 1 .. cardinality(lanes) LOOP
            IF lanes[n].state = 'committing' THEN
                lanes[n] := tbl_repl._lane_commit(lanes[n]);
            END IF;
            IF lanes[n].state = 'failed' AND lanes[n].sync AND NOT bad THEN
                first_bad := lanes[n];
                bad := true;
            END IF;
        END LOOP;
    END IF;
    IF bad THEN
        FOR n IN 1 .. cardinality(lanes) LOOP
            -- open remote transactions end with their connection
            IF two_phase AND lanes[n].conn = ANY (tbl_repl._dblink_connections()) THEN
                PERFORM tbl_repl._dblink_disconnect(lanes[n].conn);
            END IF;
        END LOOP;
        PERFORM tbl_repl._raise_lane(first_bad);
    END IF;

    FOREACH lane IN ARRAY lanes LOOP
        FOREACH parcel IN ARRAY lane.parcels LOOP
            IF parcel.target_id = ANY (lane.left_out) THEN
                failed := array_append(failed, parcel.target_id);
            ELSIF lane.state = 'failed' THEN
                PERFORM tbl_repl._log_error(parcel.target_id, NULL, lane.code, lane.error, lane.detail, lane.hint,
                                            tbl_repl._sent_sql(parcel.target_id, own, mine));
                failed := array_append(failed, parcel.target_id);
            ELSE
                PERFORM tbl_repl._count_shipped(parcel.target_id, parcel.rows);
            END IF;
        END LOOP;
    END LOOP;
    RETURN failed;
END
$function$;
COMMENT ON FUNCTION tbl_repl._ship_small(tbl_repl.parcel[], xid8, boolean) IS
    'ships few rows: one message a connection, all at once';

CREATE OR REPLACE FUNCTION tbl_repl._first_message(parcels tbl_repl.parcel[])
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT concat(CASE WHEN bool_or(p.cascades) AND count(p.upserts) + count(p.deletes) > 1 THEN 'SET CONSTRAINTS ALL DEFERRED; ' END,
                  tbl_repl._message(parcels, tbl_repl._next_variant(NULL, NULL, bool_or(p.cascades))))
    FROM unnest(parcels) AS p
$function$;
COMMENT ON FUNCTION tbl_repl._first_message(tbl_repl.parcel[]) IS 'what a connection is sent unless an error asks for another order';

CREATE OR REPLACE FUNCTION tbl_repl._lane_failed(
    lane   tbl_repl.lane,
    code   text,
    error  text,
    detail text,
    hint   text
)
RETURNS tbl_repl.lane
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    lane.state := 'failed';
    lane.code := _lane_failed.code;
    lane.error := _lane_failed.error;
    lane.detail := nullif(_lane_failed.detail, '');
    lane.hint := nullif(_lane_failed.hint, '');
    RETURN lane;
END
$function$;
COMMENT ON FUNCTION tbl_repl._lane_failed(tbl_repl.lane, text, text, text, text) IS 'notes why a connection failed';

CREATE OR REPLACE FUNCTION tbl_repl._lane_text(lane tbl_repl.lane, two_phase boolean)
RETURNS text
LANGUAGE sql VOLATILE
-- two_phase: what is deferred on the target has to be found out before anybody commits
RETURN CASE WHEN two_phase THEN format('BEGIN; %s%s; SET CONSTRAINTS ALL IMMEDIATE', lane.message, tbl_repl._seal(lane.parcels, lane.deadline))
            ELSE lane.message || tbl_repl._seal(lane.parcels, lane.deadline) END;
COMMENT ON FUNCTION tbl_repl._lane_text(tbl_repl.lane, boolean) IS
    'the message of a connection: a transaction of its own, or the first half of one';

-- _lane_send(lane, two_phase): connects if need be, and sends.  Never raises: the other connections have
-- to be served.  A connection that turns out to be dead before anything was sent is opened again.
CREATE OR REPLACE FUNCTION tbl_repl._lane_send(
    lane      tbl_repl.lane,
    two_phase boolean
)
RETURNS tbl_repl.lane
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    error_text   text;
    error_detail text;
    error_hint   text;
    sending      boolean := false;
BEGIN
    PERFORM tbl_repl._connect(lane.target_id, lane.conn, lane.deadline);
    sending := true;
    IF tbl_repl._dblink_send(lane.conn, tbl_repl._lane_text(lane, two_phase)) <> 1 THEN
        sending := false;
        IF clock_timestamp() > lane.deadline THEN
            RAISE EXCEPTION USING
                ERRCODE = 'connection_failure',
                MESSAGE = 'the target did not take the message in time';
        END IF;
        PERFORM tbl_repl._dblink_disconnect(lane.conn);
        PERFORM tbl_repl._connect(lane.target_id, lane.conn, lane.deadline);
        sending := true;
        PERFORM tbl_repl._send(lane.conn, tbl_repl._lane_text(lane, two_phase));
    END IF;
    lane.state := 'sent';
    RETURN lane;
EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
    IF sending AND SQLSTATE = '57014' THEN
        -- a cancel right behind the sending: whoever waits for the answer finds out
        lane.state := 'sent';
        RETURN lane;
    END IF;
    GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT;
    RETURN tbl_repl._lane_failed(lane, SQLSTATE, error_text, error_detail, error_hint);
END
$function$;
COMMENT ON FUNCTION tbl_repl._lane_send(tbl_repl.lane, boolean) IS 'sends a connection its message';

-- _lane_finish(lane, own, mine, two_phase): waits for the answer (state 'refused': it was an error, code and so on
-- say which); where an order of statements or a
-- missing prepared statement was the reason, tries another way; after a loss, once more over a new connection, for
-- the old session is known to be gone then.  Gives up when the lease is over, not before.
CREATE OR REPLACE FUNCTION tbl_repl._lane_finish(
    lane      tbl_repl.lane,
    own       xid8,
    mine      boolean,
    two_phase boolean
)
RETURNS tbl_repl.lane
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    error_text   text;
    error_detail text;
    error_hint   text;
    code         text;
    tried        text[] := '{}';
    cascades     boolean := (SELECT bool_or(p.cascades) FROM unnest(lane.parcels) AS p);
    variant      text := tbl_repl._next_variant(NULL, NULL, cascades);
    parcel       tbl_repl.parcel;
    ordered      tbl_repl.parcel[] := '{}';
    rendered     record;
    first_error  tbl_repl.lane;
    answered     boolean := lane.state = 'refused';
    extended     boolean := false;
    context      text;
BEGIN
    IF lane.state NOT IN ('sent', 'refused') THEN
        RETURN tbl_repl._lane_by_parts(lane, own, mine, two_phase);
    END IF;
    LOOP
        IF answered THEN
            lane.state := 'failed';
            answered := false;
        ELSE
            BEGIN
                IF tbl_repl._receive(lane.conn, lane.deadline, true) IS NULL THEN
                    RAISE EXCEPTION USING
                        ERRCODE = 'connection_failure',
                        MESSAGE = 'the target has got no message';
                END IF;
                lane.state := 'done';
                RETURN lane;
            EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
                GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT,
                    context = PG_EXCEPTION_CONTEXT;
                -- cancelled here: the answer is still to come
                CONTINUE WHEN SQLSTATE = '57014' AND NOT tbl_repl._is_too_slow(SQLSTATE, context, lane.conn) AND clock_timestamp() < lane.deadline;
                lane := tbl_repl._lane_failed(lane, SQLSTATE, error_text, error_detail, error_hint);
            END;
        END IF;
        code := lane.code;
        IF clock_timestamp() > lane.deadline THEN
            -- who has answered must not fail for a neighbour that has used up the time
            EXIT WHEN extended OR code ~ '^(08|57)';
            extended := true;
            lane.deadline := clock_timestamp() + (SELECT least(min(p.timeout) / 4, interval '1 second') FROM unnest(lane.parcels) AS p);
        END IF;
        IF first_error.code IS NULL OR first_error.code = '26000' THEN
            first_error := lane;
        END IF;
        BEGIN
            IF two_phase AND lane.conn = ANY (tbl_repl._dblink_connections()) THEN
                PERFORM tbl_repl._call(lane.conn, 'ROLLBACK', lane.deadline, true);
            END IF;
            IF code ~ '^(08|57P)' AND NOT 'lost' = ANY (tried) THEN
                -- what the new connection could not prepare either may be asked for once more
                tried := array_append(array_remove(tried, 'prepare'), 'lost');
                EXIT WHEN clock_timestamp() > lane.deadline;
                PERFORM tbl_repl._connect(lane.target_id, lane.conn, lane.deadline, lane.deadline);
            ELSIF code IN ('42501', '42883', '3F000') AND NOT 'receipt' = ANY (tried)
                  AND EXISTS (SELECT FROM unnest(lane.parcels) AS p JOIN tbl_repl.target AS t ON t.target_id = p.target_id WHERE t.receipts) THEN
                -- perhaps receipts may not be left any more: a new connection asks
                tried := array_append(tried, 'receipt');
                PERFORM tbl_repl._dblink_disconnect(lane.conn);
                PERFORM tbl_repl._connect(lane.target_id, lane.conn, lane.deadline, lane.deadline);
            ELSIF code = '26000' AND NOT 'prepare' = ANY (tried) THEN
                tried := array_append(tried, 'prepare');
                PERFORM tbl_repl._prepare_again(lane.conn, ARRAY(SELECT p.target_id FROM unnest(lane.parcels) AS p), lane.deadline, true);
            ELSE
                variant := tbl_repl._next_variant(variant, code, cascades);
                EXIT WHEN variant IS NULL;
                ordered := '{}';
                FOREACH parcel IN ARRAY lane.parcels LOOP
                    rendered := tbl_repl._render_transaction(parcel.target_id, own, mine, 'plain');
                    parcel.deletes := nullif(rendered.deletes, '');
                    parcel.upserts := nullif(rendered.upserts, '');
                    parcel.asides := NULL;
                    IF variant LIKE 'clear%' THEN
                        rendered := tbl_repl._render_transaction(parcel.target_id, own, mine, 'aside');
                        parcel.asides := nullif(rendered.deletes, '');
                        parcel.upserts := nullif(rendered.upserts, '');
                    ELSIF variant LIKE 'free%' THEN
                        rendered := tbl_repl._render_transaction(parcel.target_id, own, mine, 'free');
                        parcel.asides := nullif(rendered.deletes, '');
                    END IF;
                    ordered := array_append(ordered, parcel);
                END LOOP;
                lane.message := 'SET CONSTRAINTS ALL DEFERRED; ' || tbl_repl._message(ordered, variant);
            END IF;
            PERFORM tbl_repl._send(lane.conn, tbl_repl._lane_text(lane, two_phase));
        EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
            IF code = '26000' THEN
                -- why it cannot be prepared says more than that it is not
                GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT;
                first_error := tbl_repl._lane_failed(lane, SQLSTATE, error_text, error_detail, error_hint);
                IF SQLSTATE ~ '^(08|57P)' AND NOT 'lost' = ANY (tried) THEN
                    -- lost while it was prepared: as if lost while the answer was waited for
                    lane := first_error;
                    answered := true;
                    CONTINUE;
                END IF;
            END IF;
            EXIT;
        END;
    END LOOP;
    IF code ~ '^08' AND code <> '08000' AND NOT two_phase THEN
        -- Lost, and the old session could not be ended: its message dies with the lease.
        PERFORM tbl_repl._outlive(lane.deadline);
    ELSIF NOT two_phase AND lane.conn = ANY (tbl_repl._dblink_connections()) THEN
        -- libpq shows the last error until something succeeds, and by an error a dead connection is told
        BEGIN
            PERFORM tbl_repl._call(lane.conn, 'SELECT 1', lane.deadline, true);
        EXCEPTION WHEN assert_failure OR OTHERS THEN
            NULL;
        END;
    END IF;
    -- the first reason is the one to tell
    IF first_error.code IS NULL THEN
        first_error := lane;
    END IF;
    RETURN tbl_repl._lane_by_parts(first_error, own, mine, two_phase);
END
$function$;
COMMENT ON FUNCTION tbl_repl._lane_finish(tbl_repl.lane, xid8, boolean, boolean) IS
    'waits for the answer of a connection, tries other ways where there are any';

CREATE OR REPLACE FUNCTION tbl_repl._prepare_again(
    conn      text,
    targets   integer[],
    deadline  timestamptz,
    at_commit boolean DEFAULT false
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item  record;
    known text;
BEGIN
    FOR item IN
        SELECT tbl_repl._prepare_sql(t) AS statement, t.target_id, t.generation
        FROM tbl_repl.target AS t WHERE t.target_id = ANY (targets)
    LOOP
        known := tbl_repl._call(conn, format('SELECT pg_catalog.count(*) FROM pg_catalog.pg_prepared_statements WHERE name IN (%L, %L)',
                                             format('tbl_repl_u%s_%s', item.target_id, item.generation),
                                             format('tbl_repl_d%s_%s', item.target_id, item.generation)), deadline, at_commit);
        IF known <> '2' THEN
            -- one of two: the second one could not be prepared, and says why
            PERFORM tbl_repl._send(conn, CASE WHEN known = '1' THEN format('DEALLOCATE tbl_repl_u%s_%s; ', item.target_id, item.generation) ELSE '' END
                                         || item.statement);
            PERFORM tbl_repl._receive(conn, deadline, at_commit, NOT at_commit);
        END IF;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._prepare_again(text, integer[], timestamptz, boolean) IS
    'prepares what a connection does not know yet';

-- A target must not fail because it shares a connection with a bad one: the sync ones are tried together, then
-- each tolerant one.  Where commits wait for other connections the tolerant ones are left to the queue.
CREATE OR REPLACE FUNCTION tbl_repl._lane_by_parts(
    lane      tbl_repl.lane,
    own       xid8,
    mine      boolean,
    two_phase boolean
)
RETURNS tbl_repl.lane
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    part tbl_repl.lane := lane;
    item record;
BEGIN
    IF cardinality(lane.parcels) = 1 OR NOT EXISTS (SELECT FROM unnest(lane.parcels) AS p WHERE NOT p.sync)
       OR (two_phase AND NOT lane.sync) OR clock_timestamp() > lane.deadline OR lane.code ~ '^(08|57P)' THEN
        RETURN lane;
    END IF;
    FOR item IN
        SELECT p.sync, array_agg(p ORDER BY p.target_id) AS parcels
        FROM unnest(lane.parcels) AS p
        GROUP BY p.sync, CASE WHEN NOT p.sync THEN p.target_id END
        ORDER BY p.sync DESC, min(p.fk_rank), min(p.target_id)
    LOOP
        part.parcels := item.parcels;
        part.sync := item.sync;
        part.state := 'new';
        part.message := tbl_repl._first_message(part.parcels);
        part.deadline := lane.deadline;
        IF item.sync THEN
            -- the bad one may have used up the time
            part.deadline := greatest(lane.deadline, clock_timestamp() + (SELECT least(min(p.timeout) / 4, interval '1 second') FROM unnest(part.parcels) AS p));
        END IF;
        IF item.sync OR NOT (two_phase OR EXISTS (SELECT FROM tbl_repl._taken_along((item.parcels[1]).target_id) AS a
                                                  JOIN unnest(lane.parcels) AS p ON p.target_id = a.target_id)) THEN
            part := tbl_repl._lane_finish(tbl_repl._lane_send(part, two_phase), own, mine, two_phase);
            IF item.sync AND part.state = 'failed' AND part.code ~ '^08' THEN
                -- waits for the same, but for a shorter time
                part := tbl_repl._lane_failed(part, lane.code, lane.error, lane.detail, lane.hint);
            END IF;
        ELSE
            part := tbl_repl._lane_failed(part, lane.code, lane.error, lane.detail, lane.hint);
        END IF;
        IF part.state = 'failed' AND item.sync THEN
            RETURN part;
        ELSIF part.state = 'failed' THEN
            lane.left_out := array_append(lane.left_out, (item.parcels[1]).target_id);
            PERFORM tbl_repl._log_error((item.parcels[1]).target_id, NULL, part.code, part.error, part.detail, part.hint,
                                        tbl_repl._sent_sql((item.parcels[1]).target_id, own, mine));
        END IF;
    END LOOP;
    lane.state := 'done';
    RETURN lane;
END
$function$;
COMMENT ON FUNCTION tbl_repl._lane_by_parts(tbl_repl.lane, xid8, boolean, boolean) IS
    'ships to the targets of a connection that failed, without those that are to blame';

-- The next connection that has its answer, or none to expect; so that no retry of a healthy one waits for a
-- hung one.
CREATE OR REPLACE FUNCTION tbl_repl._next_lane(lanes tbl_repl.lane[], finished integer[])
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    spinning timestamptz := clock_timestamp() + interval '2 milliseconds';
    first    integer;
BEGIN
    LOOP
        first := NULL;
        FOR n IN 1 .. cardinality(lanes) LOOP
            CONTINUE WHEN n = ANY (finished);
            first := coalesce(first, n);
            IF cardinality(finished) = cardinality(lanes) - 1 OR lanes[n].state <> 'sent'
               OR clock_timestamp() > lanes[n].deadline OR tbl_repl._dblink_is_busy(lanes[n].conn) = 0 THEN
                RETURN n;
            END IF;
        END LOOP;
        IF clock_timestamp() > spinning THEN
            PERFORM pg_sleep(0.0005);
        END IF;
    END LOOP;
EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
    -- who waits for that one deals with it
    RETURN coalesce(first, (SELECT min(n) FROM generate_subscripts(lanes, 1) AS n WHERE n <> ALL (finished)));
END
$function$;
COMMENT ON FUNCTION tbl_repl._next_lane(tbl_repl.lane[], integer[]) IS
    'number of the connection to be looked at next';

CREATE OR REPLACE FUNCTION tbl_repl._lane_commit(lane tbl_repl.lane)
RETURNS tbl_repl.lane
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    error_text   text;
    error_detail text;
    error_hint   text;
BEGIN
    PERFORM tbl_repl._receive(lane.conn, lane.deadline, true);
    lane.state := 'done';
    RETURN lane;
EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
    GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT;
    IF SQLSTATE ~ '^08' AND SQLSTATE <> '08000' THEN
        PERFORM tbl_repl._outlive(lane.deadline);
    ELSIF lane.conn = ANY (tbl_repl._dblink_connections()) THEN
        PERFORM tbl_repl._dblink_disconnect(lane.conn);
    END IF;
    RETURN tbl_repl._lane_failed(lane, SQLSTATE, error_text, error_detail, error_hint);
END
$function$;
COMMENT ON FUNCTION tbl_repl._lane_commit(tbl_repl.lane) IS 'waits for a commit';

-- _ship_large(parcels, own, mine): many rows, or a whole table after TRUNCATE or for the initial copy: one
-- remote transaction a connection, in messages of bounded size, one connection after the other; the commits come
-- last.  Returns the targets that failed and may; raises what a sync one says.
-- Waiting does not add up.  All connections are asked at once whether they are alive, those that answer are
-- served first; what tolerant ones then lose for us by failing is taken from what the others are given.
CREATE OR REPLACE FUNCTION tbl_repl._ship_large(
    parcels tbl_repl.parcel[],
    own     xid8,
    mine    boolean
)
RETURNS integer[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    is_sync      boolean;
    lanes        tbl_repl.lane[];
    lane         tbl_repl.lane;
    finished     integer[];
    unasked      integer[];
    n            integer;
    began        timestamptz;
    bound        interval;
    patience     interval;
    lost         interval := '0';
    done         text[] := '{}';
    failed       integer[] := '{}';
    loads        tbl_repl.load[];
    shipped      jsonb;
    receipts     jsonb;
    error_text   text;
    error_detail text;
    error_hint   text;
    context      text;
    parcel       tbl_repl.parcel;
BEGIN
    -- sync targets first, in transactions of their own: all of them or none
    FOREACH is_sync IN ARRAY '{true,false}'::boolean[] LOOP
        SELECT array_agg(ROW(g.conn, g.target_id, is_sync, clock_timestamp() + g.timeout, 'new', g.parcels,
                             NULL, NULL, NULL, NULL, NULL, NULL)::tbl_repl.lane ORDER BY g.target_id)
        INTO lanes
        FROM (SELECT p.conn, min(p.target_id) AS target_id, max(p.timeout) AS timeout, array_agg(p ORDER BY p.target_id) AS parcels
              FROM unnest(parcels) AS p WHERE p.sync = is_sync GROUP BY p.conn) AS g;
        CONTINUE WHEN lanes IS NULL;
        finished := '{}';
        unasked := '{}';
        FOR i IN 1 .. cardinality(lanes) LOOP
            IF tbl_repl._is_usable(lanes[i].conn) AND tbl_repl._dblink_send(lanes[i].conn, 'SELECT 1') = 1 THEN
                lane := lanes[i];
                lane.state := 'sent';
                lanes[i] := lane;
            ELSE
                -- connecting may hang: last
                unasked := array_append(unasked, i);
            END IF;
        END LOOP;
        FOR turn IN 1 .. cardinality(lanes) LOOP
            began := clock_timestamp();
            IF turn <= cardinality(lanes) - cardinality(unasked) THEN
                n := tbl_repl._next_lane(lanes, finished || unasked);
                finished := array_append(finished, n);
            ELSE
                n := unasked[turn - cardinality(lanes) + cardinality(unasked)];
            END IF;
            lane := lanes[n];
            bound := (lane.parcels[1]).timeout;
            patience := CASE WHEN is_sync THEN bound ELSE greatest(bound - lost, least(bound, greatest(bound / 10, interval '200 milliseconds'))) END;
            BEGIN
                IF lane.state = 'sent' THEN
                    BEGIN
                        PERFORM tbl_repl._receive(lane.conn, lane.deadline);
                    EXCEPTION WHEN assert_failure OR OTHERS THEN
                        -- often found out only now, and one that can be opened again is none that hangs
                        IF clock_timestamp() > lane.deadline THEN
                            RAISE;
                        END IF;
                        IF lane.conn = ANY (tbl_repl._dblink_connections()) THEN
                            PERFORM tbl_repl._dblink_disconnect(lane.conn);
                        END IF;
                    END;
                END IF;
                PERFORM tbl_repl._connect(lane.target_id, lane.conn, clock_timestamp() + patience);
                SELECT array_agg(l) INTO loads
                FROM unnest(lane.parcels) AS p CROSS JOIN LATERAL tbl_repl._loads_of_transaction(p.target_id, own) AS l;
                IF loads IS NULL THEN
                    CONTINUE;
                END IF;
                shipped := tbl_repl._stream_any_way(lane.conn, loads, mine, patience);
                receipts := tbl_repl._leave_receipts(lane.conn, loads, own, patience);
                IF is_sync THEN
                    done := array_append(done, lane.conn);
                ELSE
                    PERFORM tbl_repl._commit(lane.conn, patience);
                END IF;
                FOREACH parcel IN ARRAY lane.parcels LOOP
                    PERFORM tbl_repl._count_shipped(parcel.target_id, coalesce((shipped ->> parcel.target_id::text)::bigint, 0),
                                                    coalesce((receipts ->> parcel.target_id::text)::integer, 0));
                END LOOP;
            EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
                GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT,
                    context = PG_EXCEPTION_CONTEXT;
                IF lane.conn = ANY (tbl_repl._dblink_connections()) THEN
                    PERFORM tbl_repl._dblink_disconnect(lane.conn);
                END IF;
                IF is_sync THEN
                    -- open remote transactions end with their connection; the others have an answer nobody reads
                    PERFORM tbl_repl._dblink_disconnect(l.conn) FROM unnest(lanes) AS l WHERE l.conn = ANY (tbl_repl._dblink_connections());
                    IF SQLSTATE = '57014' AND NOT tbl_repl._is_too_slow(SQLSTATE, context, lane.conn) THEN
                        RAISE;
                    END IF;
                    PERFORM tbl_repl._raise_lane(tbl_repl._lane_failed(lane, SQLSTATE, error_text, nullif(error_detail, ''), nullif(error_hint, '')));
                END IF;
                lost := lost + (clock_timestamp() - began);
                FOREACH parcel IN ARRAY lane.parcels LOOP
                    PERFORM tbl_repl._log_error(parcel.target_id, NULL, SQLSTATE, error_text, error_detail, error_hint, NULL);
                    failed := array_append(failed, parcel.target_id);
                END LOOP;
            END;
        END LOOP;
        PERFORM tbl_repl._commit_all(done, parcels);
        done := '{}';
    END LOOP;
    RETURN failed;
END
$function$;
COMMENT ON FUNCTION tbl_repl._ship_large(tbl_repl.parcel[], xid8, boolean) IS
    'ships many rows or whole tables in messages of bounded size';

CREATE OR REPLACE FUNCTION tbl_repl._commit_all(conns text[], parcels tbl_repl.parcel[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    one   text;
    bound interval;
BEGIN
    FOREACH one IN ARRAY conns LOOP
        SELECT max(p.timeout) INTO bound FROM unnest(parcels) AS p WHERE p.conn = one;
        PERFORM tbl_repl._commit(one, bound);
    END LOOP;
EXCEPTION WHEN assert_failure OR OTHERS THEN
    -- open remote transactions end with their connection
    PERFORM tbl_repl._dblink_disconnect(c) FROM unnest(conns) AS c WHERE c = ANY (tbl_repl._dblink_connections());
    RAISE;
END
$function$;
COMMENT ON FUNCTION tbl_repl._commit_all(text[], tbl_repl.parcel[]) IS
    'commits the remote transactions that wait for it';

-- What a transaction in flight has for one target, as loads: a whole table, or keys.
CREATE OR REPLACE FUNCTION tbl_repl._loads_of_transaction(target_id integer, own xid8)
RETURNS SETOF tbl_repl.load
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target tbl_repl.target%ROWTYPE;
    ops    "char"[];
    copies boolean;
BEGIN
    SELECT * INTO STRICT target FROM tbl_repl.target AS t WHERE t.target_id = _loads_of_transaction.target_id;
    SELECT array_agg(DISTINCT s.op) FILTER (WHERE s.op <> 'T' OR s.keys IS NULL),
           bool_or(s.op = 'C' AND s.target_id = target.target_id)
    INTO ops, copies
    FROM tbl_repl.stash AS s WHERE s.txid = own AND s.source_id = target.source_id;
    RETURN QUERY SELECT l.* FROM tbl_repl._loads(target, ops, coalesce(copies, false), format(
        'tbl_repl.stash AS c WHERE c.txid = %L AND c.source_id = %s AND c.keys IS NOT NULL', own, target.source_id)) AS l;
END
$function$;
COMMENT ON FUNCTION tbl_repl._loads_of_transaction(integer, xid8) IS
    'what a transaction in flight has for one target';

CREATE OR REPLACE FUNCTION tbl_repl._raise_lane(lane tbl_repl.lane)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = lane.code,
        MESSAGE = lane.error,
        DETAIL  = coalesce(lane.detail, format('Sync target on server %I.', (lane.parcels[1]).server)),
        HINT    = concat_ws(' ', coalesce(lane.hint, CASE WHEN lane.code IN ('55P03', '57014')
                               THEN 'Somebody holds the row on the target, perhaps a writer there who waits for this one. The local transaction is rolled back: try it again.'
                               ELSE 'The local transaction is rolled back: what a sync target, or an initial copy, cannot take is not committed here.' END),
                            -- not of one that this transaction has added
                            (SELECT format('To let changes queue meanwhile: %s', string_agg(format('SELECT tbl_repl.pause_target(%s);', p.target_id), ' '))
                             FROM unnest(lane.parcels) AS p
                             WHERE lane.code ~ '^08' AND p.sync AND NOT EXISTS (SELECT FROM tbl_repl.stash AS s WHERE s.target_id = p.target_id AND s.op = 'C')
                             HAVING count(*) > 0));
END
$function$;
COMMENT ON FUNCTION tbl_repl._raise_lane(tbl_repl.lane) IS 'fails the transaction with what a sync target said';

CREATE OR REPLACE FUNCTION tbl_repl._raise_unreadable(parcel tbl_repl.parcel, code text, message text, detail text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = code,
        MESSAGE = message,
        DETAIL  = coalesce(nullif(detail, ''), format('What sync target %s on server %I is to be sent could not be read here.', parcel.target_id, parcel.server)),
        HINT    = format('Where the table, or a right on it, has changed since the target was defined: SELECT tbl_repl.alter_target(%s);', parcel.target_id);
END
$function$;
COMMENT ON FUNCTION tbl_repl._raise_unreadable(tbl_repl.parcel, text, text, text) IS
    'fails the transaction because rows could not be read for a sync target';
