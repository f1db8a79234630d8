-- Ship: what happens at the commit of a transaction that has changed tables with direct targets.
--
-- Promises: a sync target has what is committed, or nothing is committed; a tolerant one has it, or it
-- is queued; one message a target and one round trip for all of them, as long as a transaction touches
-- few rows; nobody is waited for longer than timeout.
--
-- Why it is right.  Two transactions that write the same row are serialised by its row lock, and shipping
-- happens while it is held: among direct shippers the state committed last is the state shipped last.
-- A drainer (replay.sql) works alone: it holds the lock ship exclusively, which waits for shippers in
-- flight and turns new ones away, and reads what is committed after it got the lock.  Status is a hint;
-- the pending rows of the queue are the truth.

-- The deferred trigger of tbl_repl.flush.
-- It has to run after every other deferred check, or a commit would be shipped that still fails.
-- Deferred events fire in rounds, and an event queued in a round comes in the next one: so a firing that may not
-- be the last one only queues the next (column hop, whose update fires).  When nobody but us has written anything
-- from one firing to the next, no event can have been queued, and none is left.  That is told by the numbers of
-- commands: each command that writes takes the next one, and a row version carries its own (cmin).  Two
-- of these tools waiting for each other must end: hence the bound.
-- SET CONSTRAINTS ALL IMMEDIATE by the application makes our events fire at once, inside the statement
-- that queues them: then we are nested, and not at commit.  Our own constraint is set back.
-- A cancel must not undo here what a target has got: wherever it comes, everything is shipped once more; a message that
-- is still on its way is ended first, with its connection (see _open).  Not so one that comes before anything is
-- sent (_may_ship) or, of many rows, committed there; nor what a sync target says was cancelled.
-- No sequential scans: plans are made while stash and flush are small, and these two grow between two vacuums.
-- jit: where one cannot be helped it looks very dear, and compiling takes longer than anything here.
CREATE OR REPLACE FUNCTION tbl_repl._flush()
RETURNS trigger
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
SET jit = off
AS $function$
DECLARE
    quiet   boolean := false;
    tries   integer := 0;
    context text;
BEGIN
    IF pg_trigger_depth() > 1 THEN
        SET CONSTRAINTS tbl_repl.flush_at_commit DEFERRED;
        UPDATE tbl_repl.flush AS f SET hop = 0 WHERE f.txid = NEW.txid;
        RETURN NULL;
    END IF;
    IF NEW.hop > 0 THEN
        UPDATE tbl_repl.flush AS f SET written = f.cmin::text::integer WHERE f.txid = NEW.txid
        RETURNING f.cmin::text::integer = f.written + 1 OR f.hop > 100 INTO quiet;
    END IF;
    IF NOT quiet THEN
        UPDATE tbl_repl.flush AS f SET hop = NEW.hop + 1 WHERE f.txid = NEW.txid;
        RETURN NULL;
    END IF;
    LOOP
        BEGIN
            IF NEW.key IS NULL OR current_setting('transaction_isolation') <> 'read committed' OR NOT tbl_repl._ship_quickly(NEW) THEN
                DELETE FROM tbl_repl.flush AS f WHERE f.txid = NEW.txid;
                PERFORM tbl_repl._unpack(NEW);
                PERFORM tbl_repl._ship_transaction(NEW.txid);
                DELETE FROM tbl_repl.stash AS s WHERE s.txid = NEW.txid;
            END IF;
            RETURN NULL;  -- in here: behind the block a cancel could still come
        EXCEPTION WHEN query_canceled THEN
            GET STACKED DIAGNOSTICS context = PG_EXCEPTION_CONTEXT;
            tries := tries + 1;
            IF tries > 5 OR context ~ '_(raise_lane|may_ship|ship_large)[(]' THEN
                RAISE;
            END IF;
        END;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._flush() IS
    'at commit: ships what the transaction has changed; SECURITY DEFINER, for writers have no right here';

CREATE CONSTRAINT TRIGGER flush_at_commit
    AFTER INSERT OR UPDATE OF hop ON tbl_repl.flush
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION tbl_repl._flush();
-- what has been captured is shipped, also where session_replication_role has been set to replica meanwhile
ALTER TABLE tbl_repl.flush ENABLE ALWAYS TRIGGER flush_at_commit;

-- Only the text of the command tells that this commit is a PREPARE TRANSACTION.  There is none (NULL) where
-- the extended protocol commits by itself.
CREATE OR REPLACE FUNCTION tbl_repl._is_preparing()
RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RETURN coalesce(current_query() ~* E'prepare\\s+transaction'
       AND regexp_replace(regexp_replace(current_query(), E'''[^'']*''|/\\*.*?\\*/|--[^\\n]*', ' ', 'g'), E'\\s+', ' ', 'g')
           ~* E'(^|;)\\s*prepare transaction', false);
END
$function$;
COMMENT ON FUNCTION tbl_repl._is_preparing() IS 'whether the command in progress is PREPARE TRANSACTION';

-- _render_transaction(target_id, own, mine, form): the keys that transaction own has changed in the
-- target's source, rendered.  NULL, NULL, 0 where its operations leave nothing.
CREATE OR REPLACE FUNCTION tbl_repl._render_transaction(
    target_id integer,
    own       xid8,
    mine      boolean,
    form      text,
    OUT deletes text,
    OUT upserts text,
    OUT rows    integer
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target  record;
    item    record;
    written text[];
    removed text[];
    more    record;
BEGIN
    SELECT t.source_id, t.operations, t.operations @> '{insert,update,delete,truncate}' AS everything
    INTO target
    FROM tbl_repl.target AS t WHERE t.target_id = _render_transaction.target_id;
    FOR item IN SELECT s.op, s.keys FROM tbl_repl.stash AS s
                WHERE s.txid = own AND s.source_id = target.source_id AND s.keys IS NOT NULL AND s.op <> 'N'
    LOOP
        IF target.everything OR (item.op = 'I' AND 'insert' = ANY (target.operations))
                             OR (item.op = 'U' AND 'update' = ANY (target.operations)) THEN
            written := CASE WHEN written IS NULL THEN item.keys ELSE written || item.keys END;
        ELSIF (item.op = 'K' AND 'update' = ANY (target.operations)) OR (item.op = 'D' AND 'delete' = ANY (target.operations))
           OR (item.op = 'T' AND 'truncate' = ANY (target.operations)) THEN
            removed := CASE WHEN removed IS NULL THEN item.keys ELSE removed || item.keys END;
        END IF;
    END LOOP;
    rows := 0;
    IF written IS NOT NULL THEN
        IF cardinality(written) > 1 THEN
            SELECT array_agg(DISTINCT k) INTO written FROM unnest(written) AS k;
        END IF;
        EXECUTE format('SELECT * FROM tbl_repl.render_%s($1, $2, $3, $4)', target_id)
        INTO deletes, upserts, rows
        USING written, mine, target.everything OR 'delete' = ANY (target.operations), form;
    END IF;
    IF removed IS NOT NULL THEN
        SELECT array_agg(DISTINCT k) INTO removed FROM unnest(removed) AS k;
        EXECUTE format('SELECT * FROM tbl_repl.render_%s($1, $2, $3, $4)', target_id)
        INTO more USING removed, mine, true, form;
        deletes := concat_ws('; ', deletes, more.deletes);
        upserts := concat_ws('; ', upserts, more.upserts);
        rows := rows + more.rows;
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._render_transaction(integer, xid8, boolean, text) IS
    'what a transaction in flight has changed, as SQL for one target';

CREATE OR REPLACE FUNCTION tbl_repl._sent_sql(target_id integer, own xid8, mine boolean)
RETURNS text
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT nullif(concat_ws('; ', r.deletes, r.upserts), '') FROM tbl_repl._render_transaction(target_id, own, mine, 'plain') AS r
$function$;
COMMENT ON FUNCTION tbl_repl._sent_sql(integer, xid8, boolean) IS
    'what a transaction in flight has changed, for people: without names of prepared statements';

-- _message(parcels, variant): deletions from the referencing tables upwards, rows from the referenced tables downwards, in
-- one of the _variants.
CREATE OR REPLACE FUNCTION tbl_repl._message(parcels tbl_repl.parcel[], variant text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN variant LIKE '%upserts first'
                THEN concat_ws('; ', string_agg(p.asides, '; ' ORDER BY p.fk_rank DESC, p.target_id),
                                     string_agg(p.upserts, '; ' ORDER BY p.fk_rank, p.target_id),
                                     string_agg(p.deletes, '; ' ORDER BY p.fk_rank DESC, p.target_id))
                ELSE concat_ws('; ', string_agg(p.asides, '; ' ORDER BY p.fk_rank DESC, p.target_id),
                                     string_agg(p.deletes, '; ' ORDER BY p.fk_rank DESC, p.target_id),
                                     string_agg(p.upserts, '; ' ORDER BY p.fk_rank, p.target_id)) END
    FROM unnest(parcels) AS p
$function$;
COMMENT ON FUNCTION tbl_repl._message(tbl_repl.parcel[], text) IS
    'the statements for one connection, in an order that foreign keys allow';

-- _ship_transaction(own): routes, ships, queues what could not be shipped.  SQLSTATE of a failed sync
-- target is the remote one.  Takes ship (shared) of each target it ships to, then queue (shared) of each
-- it queues for, all to the end of the transaction.
-- Nothing is planned anew at every commit.
CREATE OR REPLACE FUNCTION tbl_repl._ship_transaction(own xid8)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $function$
DECLARE
    repeatable boolean := current_setting('transaction_isolation') <> 'read committed';
    preparing  boolean := false;
    total      bigint;
    whole      boolean;
    waking     boolean;
    noting     boolean;
    removing   boolean;
    changed    integer[];
    copied     integer[];
    item       record;
    parcels    tbl_repl.parcel[] := '{}';
    removes    boolean := false;
    torn       integer[] := '{}';
    failed     integer[] := '{}';
    queued     integer[] := '{}';
BEGIN
    SELECT sum(s.row_count), bool_or(s.keys IS NULL AND s.op <> 'W'), bool_or(s.op = 'W'), bool_or(s.op = 'N'), bool_or(s.op IN ('D', 'K', 'T')),
           array_agg(s.source_id) FILTER (WHERE s.op NOT IN ('C', 'W', 'N')), array_agg(s.target_id) FILTER (WHERE s.op = 'C')
    INTO total, whole, waking, noting, removing, changed, copied
    FROM tbl_repl.stash AS s WHERE s.txid = own;
    IF total IS NULL THEN
        RETURN;
    END IF;
    IF noting THEN
        PERFORM tbl_repl._note_carried(own);
    END IF;
    preparing := tbl_repl._is_preparing();
    IF waking AND NOT preparing THEN
        NOTIFY tbl_repl;
    END IF;
    IF total = 0 THEN
        RETURN;
    END IF;

    FOR item IN
        SELECT t.target_id, t.source_id, t.server, t.mode, t.timeout, s.source_table, s.fk_rank, st.status,
               coalesce(t.target_id = ANY (copied), false) AS copies, t.owner, t.cascades,
               t.cascades AND t.mode = 'tolerant' AND (removing OR t.filter_expr IS NOT NULL) AS removes
        FROM tbl_repl.target AS t
        JOIN tbl_repl.target_state AS st USING (target_id)
        JOIN tbl_repl.source AS s USING (source_id)
        -- not one that this transaction has dropped
        JOIN pg_class AS c ON c.oid = s.source_table
        WHERE (t.source_id = ANY (changed) AND t.mode <> 'async'
               -- what else there is has been queued by capture
               AND (t.mode = 'sync' OR current_setting('transaction_isolation') <> 'serializable')) OR t.target_id = ANY (copied)
        ORDER BY t.target_id
    LOOP
        IF preparing AND (item.copies OR (item.mode = 'sync' AND item.status = 'ok')) THEN
            RAISE EXCEPTION USING
                ERRCODE = 'feature_not_supported',
                MESSAGE = format('cannot PREPARE a transaction that has written table %s, which has a sync target, or has added a target to it',
                                 item.source_table),
                HINT    = 'Commit it in one phase, or make the target tolerant or async.';
        ELSIF NOT preparing AND tbl_repl._may_ship(item.target_id, item.status, item.mode, item.timeout, repeatable) THEN
            parcels := array_append(parcels, ROW(item.target_id, item.source_id, item.server,
                tbl_repl._connection_name(item.server, item.owner, item.timeout),
                item.mode = 'sync' OR item.copies, item.timeout, item.fk_rank, item.cascades, NULL, NULL, NULL, 0)::tbl_repl.parcel);
            removes := removes OR item.removes;
        ELSE
            queued := array_append(queued, item.target_id);
        END IF;
    END LOOP;
    IF removes THEN
        torn := tbl_repl._torn_from(parcels, queued);
        parcels := ARRAY(SELECT p FROM unnest(parcels) AS p WHERE p.target_id <> ALL (torn));
        PERFORM tbl_repl._log_error(t, NULL, '23503', 'rows of other tables wait for another way to the target',
                                    'They may refer to rows that are deleted, and would go along.', 'Replay ships these after those.', NULL)
        FROM unnest(torn) AS t;
    END IF;

    IF cardinality(parcels) > 0 THEN
        failed := CASE WHEN whole OR total > tbl_repl._rows_per_message() THEN tbl_repl._ship_large(parcels, own, repeatable)
                       ELSE tbl_repl._ship_small(parcels, own, repeatable) END;
    END IF;
    failed := failed || torn;
    IF cardinality(queued) > 0 OR cardinality(failed) > 0 THEN
        PERFORM tbl_repl._queue_for(own, queued, failed);
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._ship_transaction(xid8) IS
    'ships what a transaction has changed to its direct targets, or queues it';

-- _queue_for(own, queued, failed): the second pass of a commit: queues what the transaction has changed for the targets
-- that were turned away (queued), and for those that have failed.
CREATE OR REPLACE FUNCTION tbl_repl._queue_for(own xid8, queued integer[], failed integer[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    repeatable boolean := current_setting('transaction_isolation') <> 'read committed';
    preparing  boolean := tbl_repl._is_preparing();
    entered    boolean;
    total      bigint;
    whole      boolean;
    item       record;
    parcels    tbl_repl.parcel[];
BEGIN
    SELECT sum(s.row_count), bool_or(s.keys IS NULL AND s.op <> 'W') INTO total, whole FROM tbl_repl.stash AS s WHERE s.txid = own;
    -- Second pass.  With queue held nobody can set a target back to ok until we have committed; so one
    -- that has become ok meanwhile has to be shipped to after all, or its rows would wait behind nothing.
    FOR item IN SELECT q.target_id, q.target_id = ANY (failed) AS has_failed
                FROM (SELECT unnest(queued) UNION SELECT unnest(failed)) AS q (target_id) ORDER BY 1
    LOOP
        entered := tbl_repl._enter_queue(item.target_id);
        IF entered AND NOT item.has_failed AND NOT preparing AND NOT repeatable
           AND tbl_repl._is_ok(item.target_id) AND tbl_repl._may_ship(item.target_id, 'ok', 'tolerant', NULL, false)
        THEN
            SELECT array_agg(ROW(t.target_id, t.source_id, t.server, tbl_repl._connection_name(t.server, t.owner, t.timeout),
                                 t.mode = 'sync', t.timeout, s.fk_rank, t.cascades, NULL, NULL, NULL, 0)::tbl_repl.parcel) INTO parcels
            FROM tbl_repl.target AS t JOIN tbl_repl.source AS s USING (source_id) WHERE t.target_id = item.target_id;
            failed := CASE WHEN whole OR total > tbl_repl._rows_per_message()
                           THEN tbl_repl._ship_large(parcels, own, repeatable)
                           ELSE tbl_repl._ship_small(parcels, own, repeatable) END;
            CONTINUE WHEN cardinality(failed) = 0;
            item.has_failed := true;
        END IF;
        INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count, olds)
        SELECT h.segment, c.source_id, item.target_id, c.op, c.keys, c.row_count, c.olds
        FROM tbl_repl.stash AS c
        JOIN tbl_repl.target AS t ON t.source_id = c.source_id AND t.target_id = item.target_id
        CROSS JOIN tbl_repl.queue_head AS h
        WHERE c.txid = own AND c.op NOT IN ('C', 'W', 'N')
        ORDER BY c.first DESC, c.ctid;
        IF item.has_failed THEN
            PERFORM tbl_repl._set_queueing(item.target_id);
        END IF;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._queue_for(xid8, integer[], integer[]) IS
    'queues what a transaction has changed for targets that it could not ship to';

-- Takes queue (shared).  Only a drainer that sets the status holds it against us, to its commit.  The
-- application's lock_timeout and a cancel must not fail its commit for that, nor may it wait for long: who does
-- not get the lock queues all the same, as under SERIALIZABLE.
CREATE OR REPLACE FUNCTION tbl_repl._enter_queue(target_id integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    give_up timestamptz := clock_timestamp() + (SELECT t.timeout FROM tbl_repl.target AS t WHERE t.target_id = _enter_queue.target_id);
BEGIN
    WHILE NOT pg_try_advisory_xact_lock_shared(tbl_repl._lock_queue(), target_id) LOOP
        IF clock_timestamp() > give_up THEN
            RETURN false;
        END IF;
        PERFORM pg_sleep(0.001);
    END LOOP;
    RETURN true;
EXCEPTION WHEN query_canceled THEN
    RETURN false;
END
$function$;
COMMENT ON FUNCTION tbl_repl._enter_queue(integer) IS
    'takes the lock queue for a writer that is going to queue; whether it got it';

-- _ship_quickly(change): the usual case, one row of a table with one direct target, in READ COMMITTED.  No lists,
-- nothing looked up twice, and what has to be written here is written while the target works; the rules are those of
-- _ship_transaction.  False: it is another case, or anything was unusual before the message was sent; nothing has
-- happened then.  Raises what a sync target says.
CREATE OR REPLACE FUNCTION tbl_repl._ship_quickly(change tbl_repl.flush)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $function$
DECLARE
    item         record;
    message      text;
    receipt      text;
    deadline     timestamptz;
    lane         tbl_repl.lane;
    sending      boolean := false;
    error_text   text;
    error_detail text;
    error_hint   text;
    context      text;
BEGIN
    SELECT t.source_id, t.server, t.timeout, t.mode = 'sync' AS sync, t.receipts, t.cascades,
           format('tbl_repl_%s_%s_%s_%s', f.oid, to_regrole(quote_ident(t.owner))::oid, ceil(extract(epoch FROM t.timeout) * 1000), f.xmin) AS conn
    INTO item
    FROM tbl_repl.target AS t
    JOIN tbl_repl.target_state AS st ON st.target_id = t.target_id AND st.status = 'ok'
    JOIN pg_foreign_server AS f ON f.srvname = t.server
    WHERE t.target_id = change.target_id AND t.mode <> 'async'
      AND NOT (t.cascades AND t.mode = 'tolerant' AND (change.op IN ('D', 'K') OR t.filter_expr IS NOT NULL))
      AND NOT EXISTS (SELECT FROM tbl_repl.stash AS s WHERE s.txid = change.txid);
    -- Once ship is held nothing but the sending may follow: who has more to ship takes it in order.  And the status is looked at
    -- once more, for who has held it may have changed that.
    IF NOT FOUND OR tbl_repl._is_preparing()
       OR NOT coalesce(item.conn = ANY (tbl_repl._dblink_connections()), false)
       OR NOT pg_try_advisory_xact_lock_shared(tbl_repl._lock_ship(), change.target_id)
       OR NOT tbl_repl._is_ok(change.target_id)
    THEN
        RETURN false;
    END IF;
    BEGIN
        deadline := clock_timestamp() + item.timeout;
        EXECUTE format('SELECT tbl_repl.row_%s($1, $2)', change.target_id)
        INTO message USING change.key, extract(epoch FROM deadline);
        receipt := CASE WHEN item.receipts THEN tbl_repl._receipt(change.target_id, 0, ARRAY[change.key], deadline) ELSE '' END;
        IF tbl_repl._dblink_is_busy(item.conn) <> 0 OR tbl_repl._dblink_error(item.conn) <> 'OK' THEN
            RETURN false;
        END IF;
        sending := true;
        IF tbl_repl._dblink_send(item.conn, message || receipt) <> 1 THEN
            RETURN false;
        END IF;
    EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
        -- a cancel right behind the sending: below, whoever waits for the answer finds out
        IF NOT sending THEN
            RETURN false;
        END IF;
    END;
    DELETE FROM tbl_repl.flush AS f WHERE f.txid = change.txid;
    PERFORM tbl_repl._count_shipped(change.target_id, 1);
    BEGIN
        IF tbl_repl._receive(item.conn, deadline, true) IS NULL THEN
            RAISE EXCEPTION USING
                ERRCODE = 'connection_failure',
                MESSAGE = 'the target has got no message';
        END IF;
        RETURN true;
    EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
        GET STACKED DIAGNOSTICS error_text = MESSAGE_TEXT, error_detail = PG_EXCEPTION_DETAIL, error_hint = PG_EXCEPTION_HINT,
            context = PG_EXCEPTION_CONTEXT;
        SELECT item.conn, change.target_id, item.sync, deadline, 'sent',
               ARRAY[ROW(change.target_id, item.source_id, item.server, item.conn, item.sync, item.timeout, s.fk_rank, item.cascades, NULL, NULL, message, 1)::tbl_repl.parcel],
               message, NULL, NULL, NULL, NULL, NULL
        INTO lane
        FROM tbl_repl.source AS s WHERE s.source_id = item.source_id;
        -- cancelled here: the answer is still to come
        IF SQLSTATE <> '57014' OR tbl_repl._is_too_slow(SQLSTATE, context, item.conn) THEN
            lane := tbl_repl._lane_failed(lane, SQLSTATE, error_text, error_detail, error_hint);
            lane.state := 'refused';
        END IF;
    END;
    PERFORM tbl_repl._unpack(change);
    lane := tbl_repl._lane_finish(lane, change.txid, false, false);
    IF lane.state <> 'done' THEN
        IF item.sync THEN
            PERFORM tbl_repl._raise_lane(lane);
        END IF;
        PERFORM tbl_repl._count_shipped(change.target_id, -1);
        PERFORM tbl_repl._log_error(change.target_id, NULL, lane.code, lane.error, lane.detail, lane.hint, tbl_repl._sent_sql(change.target_id, change.txid, false));
        PERFORM tbl_repl._queue_for(change.txid, '{}', ARRAY[change.target_id]);
    ELSE
        PERFORM tbl_repl._count_shipped(change.target_id, 0);  -- another receipt
    END IF;
    DELETE FROM tbl_repl.stash AS s WHERE s.txid = change.txid;
    RETURN true;
END
$function$;
COMMENT ON FUNCTION tbl_repl._ship_quickly(tbl_repl.flush) IS
    'ships a single row to its only direct target, if there is nothing unusual about it';

-- A change that cannot be shipped quickly is one of several.
CREATE OR REPLACE FUNCTION tbl_repl._unpack(change tbl_repl.flush)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    INSERT INTO tbl_repl.stash (source_id, op, keys, row_count, first)
    SELECT t.source_id, change.op, ARRAY[change.key], 1, true
    FROM tbl_repl.target AS t WHERE t.target_id = change.target_id AND change.key IS NOT NULL
$function$;
COMMENT ON FUNCTION tbl_repl._unpack(tbl_repl.flush) IS 'puts the change that was kept in flush into the stash';

CREATE OR REPLACE FUNCTION tbl_repl._rows_per_message() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1000;
COMMENT ON FUNCTION tbl_repl._rows_per_message() IS 'how many rows one message carries at the most';

-- May this transaction ship to the target directly?  Takes ship (shared) if so.
-- A REPEATABLE READ writer sees status and definition of its snapshot: FOR SHARE fails (40001) when they have changed
-- since, and holds them from then on; SKIP LOCKED, for who is changing them may take as long as he likes.  Others look once
-- more when they have got ship: who has held it may have paused the target, or begun to copy it.  A sync writer that
-- finds a drainer at work while the status is ok, or somebody who changes what its snapshot shows, waits, bounded.
CREATE OR REPLACE FUNCTION tbl_repl._may_ship(
    target_id  integer,
    status     text,
    mode       text,
    timeout    interval,
    repeatable boolean
)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    deadline timestamptz := clock_timestamp() + timeout;
    seen     boolean := NOT repeatable;
BEGIN
    IF status <> 'ok' THEN
        RETURN false;
    END IF;
    LOOP
        IF NOT seen THEN
            BEGIN
                PERFORM FROM tbl_repl.target_state AS st JOIN tbl_repl.target AS t USING (target_id) WHERE st.target_id = _may_ship.target_id FOR SHARE SKIP LOCKED;
                seen := FOUND;
            EXCEPTION WHEN serialization_failure THEN
                RETURN false;
            END;
        END IF;
        EXIT WHEN seen AND pg_try_advisory_xact_lock_shared(tbl_repl._lock_ship(), target_id);
        IF mode <> 'sync' OR (NOT repeatable AND NOT tbl_repl._is_ok(target_id)) THEN
            RETURN false;
        ELSIF clock_timestamp() > deadline THEN
            RAISE EXCEPTION USING
                ERRCODE = 'lock_not_available',
                MESSAGE = format('sync target %s is busy', target_id),
                DETAIL  = CASE WHEN seen THEN 'A replay of its queue holds it.' ELSE 'Another transaction is changing it.' END,
                HINT    = 'Try again, or give the target a longer timeout.';
        END IF;
        PERFORM pg_sleep(0.001);
    END LOOP;
    RETURN repeatable OR tbl_repl._is_ok(target_id);
END
$function$;
COMMENT ON FUNCTION tbl_repl._may_ship(integer, text, text, interval, boolean) IS
    'whether a writer may ship to a target directly; takes the lock ship if so';

CREATE OR REPLACE FUNCTION tbl_repl._is_ok(target_id integer)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RETURN (SELECT st.status = 'ok' FROM tbl_repl.target_state AS st WHERE st.target_id = _is_ok.target_id);
END
$function$;
COMMENT ON FUNCTION tbl_repl._is_ok(integer) IS 'whether the status of a target is ok now: VOLATILE, for a new snapshot';

-- SKIP LOCKED: who holds the row is setting it as well, or has just brought the target back.  Its commit is waited for, a moment:
-- otherwise our next transaction would still find ok, and wait for the target once more.
CREATE OR REPLACE FUNCTION tbl_repl._set_queueing(target_id integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    give_up timestamptz := clock_timestamp() + interval '200 milliseconds';
BEGIN
    LOOP
        UPDATE tbl_repl.target_state AS st SET status = 'queueing'
        WHERE st.target_id IN (SELECT l.target_id FROM tbl_repl.target_state AS l
                               WHERE l.target_id = _set_queueing.target_id AND l.status = 'ok' FOR UPDATE SKIP LOCKED);
        EXIT WHEN FOUND OR NOT tbl_repl._is_ok(target_id) OR clock_timestamp() > give_up OR current_setting('transaction_isolation') <> 'read committed';
        PERFORM pg_sleep(0.002);
    END LOOP;
EXCEPTION WHEN serialization_failure THEN
    NULL;  -- under REPEATABLE READ: changed since our snapshot; the rows we queued are pending all the same
END
$function$;
COMMENT ON FUNCTION tbl_repl._set_queueing(integer) IS
    'a target failed: from now on its changes queue';
