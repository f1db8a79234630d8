-- Wait: read your writes on another server.
--
-- change_token() names what has been written up to now, wait_for() waits until a target has it.  What a token
-- names is a set of transactions; a target has it when none of them has a row left in its queue, and its initial copy has ended.

-- change_token(): everything that is committed and visible now, and the caller's own transaction if it has written.
-- Its text: snapshot/own transaction/node.
CREATE OR REPLACE FUNCTION tbl_repl.change_token()
RETURNS text
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('%s/%s/%s', pg_current_snapshot(), pg_current_xact_id_if_assigned(), tbl_repl.node_name())
$function$;
COMMENT ON FUNCTION tbl_repl.change_token() IS
    'names everything that is committed now, and the present transaction; for wait_for';

-- wait_for(target_id, token, timeout): true when the target has everything that the token names, false when it has
-- not in time.  Rows in quarantine count as handled; a transaction that was rolled back has nothing to wait for.
-- Errors: 42704 unknown target; 22023 not a token of this node, bad timeout; 25001 where waiting is vain: the
-- transaction of the token is the caller's own, or the caller's snapshot does not move.
-- Why it is right: a row of the queue becomes visible with its transaction.  So when that has ended, what is not
-- pending now has been shipped, at its commit or by a drainer, whose remote commit precedes the new position.
-- SECURITY DEFINER: a reader may not see the queue.
CREATE OR REPLACE FUNCTION tbl_repl.wait_for(
    target_id integer,
    token     text,
    timeout   interval DEFAULT '10 s'
)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    deadline  timestamptz := clock_timestamp() + timeout;
    parts     text[] := regexp_match(token, '^([0-9]+:[0-9]+:[0-9,]*)/([0-9]*)/(.+)$');
    named     pg_snapshot;
    own       xid8;
    condition text;
    look      text;
    waiting   boolean;
    looked_at timestamptz;
    pause     double precision := 0.0005;
BEGIN
    IF timeout IS NULL OR timeout < interval '0' OR NOT isfinite(deadline) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('invalid timeout: %s', coalesce(timeout::text, 'NULL')),
            HINT    = 'Give an interval of zero or more.';
    END IF;
    BEGIN
        named := parts[1]::pg_snapshot;
        own := nullif(parts[2], '')::xid8;
        -- one from the future is of another cluster: it could never be waited for
        IF own IS NOT NULL THEN
            PERFORM pg_xact_status(own);
        END IF;
    EXCEPTION WHEN data_exception THEN
        named := NULL;
    END;
    IF named IS NULL OR parts[3] <> tbl_repl.node_name() THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('not a token of this node: %s', coalesce(quote_literal(token), 'NULL')),
            HINT    = 'Give what tbl_repl.change_token() has returned here, on the node of the source table.';
    ELSIF own = pg_current_xact_id_if_assigned() THEN
        RAISE EXCEPTION USING
            ERRCODE = 'active_sql_transaction',
            MESSAGE = 'the transaction that is waited for has not been committed yet',
            HINT    = 'Take the token in the transaction, and wait after its COMMIT.';
    ELSIF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'active_sql_transaction',
            MESSAGE = 'wait_for needs READ COMMITTED',
            DETAIL  = 'The snapshot of this transaction does not show what is shipped while it waits.',
            HINT    = 'Call it in a transaction of its own.';
    END IF;
    condition := format(' AND (pg_visible_in_snapshot(c.txid, %L)%s)', named, ' OR c.txid = ' || quote_literal(own));
    LOOP
        looked_at := clock_timestamp();
        -- the transaction first: what it has queued is seen only by a statement that begins after its end
        waiting := coalesce(pg_xact_status(own) = 'in progress', false);
        -- no row when the target has been dropped, with what was queued for it
        look := (SELECT format('SELECT st.copy_after IS NOT NULL OR EXISTS (SELECT FROM %s%s%s) FROM tbl_repl.target_state AS st WHERE st.target_id = %s',
                               tbl_repl._pending_from(t, tbl_repl._position(t.target_id), greatest(pg_snapshot_xmax(named), own)), tbl_repl._wanted(t),
                               condition, t.target_id)
                 FROM tbl_repl.target AS t WHERE t.target_id = wait_for.target_id);
        IF look IS NOT NULL AND NOT waiting THEN
            EXECUTE look INTO waiting;
        END IF;
        IF look IS NULL OR waiting IS NULL THEN
            RAISE EXCEPTION USING
                ERRCODE = 'undefined_object',
                MESSAGE = format('target %s does not exist', coalesce(target_id::text, 'NULL')),
                HINT    = 'See tbl_repl.target_status.';
        END IF;
        IF NOT waiting THEN
            RETURN true;
        ELSIF clock_timestamp() >= deadline THEN
            RETURN false;
        END IF;
        -- where others have queued much, looking takes longer: no more than a tenth of the time goes into it
        pause := least(pause * 1.5, 0.05);
        PERFORM pg_sleep(least(greatest(pause, 9 * extract(epoch FROM clock_timestamp() - looked_at)),
                               greatest(extract(epoch FROM deadline - clock_timestamp()), 0.0005)));
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl.wait_for(integer, text, interval) IS
    'waits until a target has what a token of change_token() names; SECURITY DEFINER, for readers';
