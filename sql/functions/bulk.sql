-- Bulk: what the worker needs to move a large batch by COPY instead of by SQL text.
--
-- What is shipped, and what a position means, is the same as in replay; only the way of the rows is
-- another.  The worker holds the locks ship for the session, reads everything in one REPEATABLE READ snapshot
-- taken after that, and applies it in one remote transaction; then _bulk_done moves the positions.  Whatever it
-- cannot do, or fails at, replay does.

-- _bulk_lanes(server, min_rows): targets behind one connection that have at least so many rows queued,
-- and nothing that only replay can handle.  Not those that are shipped to directly: their writers would wait for all of it.  SECURITY DEFINER: the worker's role may see status only.
CREATE OR REPLACE FUNCTION tbl_repl._bulk_lanes(server name, min_rows bigint)
RETURNS TABLE (targets integer[], owner name, timeout interval)
LANGUAGE sql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT array_agg(t.target_id ORDER BY t.target_id), t.owner, t.timeout
    FROM tbl_repl.target AS t
    JOIN tbl_repl.target_state AS st USING (target_id)
    CROSS JOIN LATERAL tbl_repl._pending_rows(t.target_id) AS p
    WHERE t.server = _bulk_lanes.server AND tbl_repl._takes_bulk(st) AND (t.mode = 'async' OR st.status <> 'ok' OR p.rows > 0)
    GROUP BY t.owner, t.timeout
    HAVING sum(p.rows) >= min_rows
       AND bool_and(t.operations @> '{insert,update,delete,truncate}')
       AND bool_and(t.on_conflict = 'overwrite')
       -- each row with its origin: only replay knows how
       AND bool_and(t.forward = 'local')
       AND bool_and(NOT EXISTS (SELECT FROM tbl_repl.quarantined AS q WHERE q.target_id = t.target_id))
       AND bool_and(cardinality(tbl_repl._always_columns(t)) = 0)
       AND NOT tbl_repl._is_torn(array_agg(t.target_id))
$function$;
COMMENT ON FUNCTION tbl_repl._bulk_lanes(name, bigint) IS
    'targets of a server with a backlog worth a COPY';

CREATE OR REPLACE FUNCTION tbl_repl._takes_bulk(state tbl_repl.target_state)
RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT state.status IN ('ok', 'queueing') AND state.copy_after IS NULL
$function$;
COMMENT ON FUNCTION tbl_repl._takes_bulk(tbl_repl.target_state) IS 'whether the worker may ship to a target by COPY now';

-- _bulk_jobs(targets): for the snapshot of this statement, what to read here and what to run there; none for a target
-- that was paused, or begun to be copied, while ship was waited for.
--   is_binary: whether both sides have the same types, so that COPY need not look inside
--   rows_query: run here as the target's owner: rows that may go straight into the table, by COPY
--   batch_query: the same for rows that go into a temporary table first, and keys whose rows are gone; NULL: straight
--   whole: everything, after TRUNCATE; cascades: rows first, see _next_variant
--   stage, gone, remove, merge: statements for the target: create the temporary table; take the keys out of it, as many
--   as rows are affected (NULL: not needed); delete their rows; write the others
-- SECURITY DEFINER: works on the private tables, as replay does.
CREATE OR REPLACE FUNCTION tbl_repl._bulk_jobs(targets integer[])
RETURNS TABLE (
    target_id   integer,
    fk_rank     integer,
    dst_table   text,
    dst_columns text,
    is_binary   boolean,
    whole       boolean,
    cascades    boolean,
    rows_query  text,
    batch_query text,
    stage       text,
    gone        text,
    remove      text,
    merge       text
)
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    target  tbl_repl.target%ROWTYPE;
    source  tbl_repl.source%ROWTYPE;
    pending text;
    ops     text[];
    parts   record;
    columns text;
    keys    text;
    matches text;
    listing text;
    amount  bigint;
    single  record;
BEGIN
    FOR target IN SELECT t.* FROM tbl_repl.target AS t JOIN tbl_repl.target_state AS st USING (target_id)
                  WHERE t.target_id = ANY (targets) AND tbl_repl._takes_bulk(st) ORDER BY t.target_id LOOP
        SELECT * INTO STRICT source FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
        pending := tbl_repl._pending_from(target, tbl_repl._position(target.target_id));
        EXECUTE format('SELECT array_agg(DISTINCT CASE WHEN c.op = ''T'' AND c.keys IS NOT NULL THEN ''t'' ELSE c.op::text END), '
                       'sum(c.row_count) FROM %s', pending) INTO ops, amount;
        CONTINUE WHEN ops IS NULL;
        parts := tbl_repl._upsert_parts(target);
        target_id := target.target_id;
        fk_rank := source.fk_rank;
        dst_table := tbl_repl._dst_table(target);
        dst_columns := tbl_repl._dst_columns(target);
        cascades := target.cascades;
        whole := 'T' = ANY (ops) AND NOT tbl_repl._truncates_by_key(target.target_id);
        is_binary := tbl_repl._may_copy_binary(target, source);
        columns := tbl_repl._sent_list(target, is_binary);
        matches := tbl_repl._row_match(target, source) || coalesce(' AND (' || target.filter_expr || ')', '');
        -- a TRUNCATE of the whole table has no keys, one of a partition has
        keys := format('SELECT unnest(c.keys) AS tbl_repl_key FROM %s', pending);
        -- rows that were only inserted come in the order in which they were, which the target's index likes, and once each
        rows_query := CASE WHEN whole THEN format('SELECT %s FROM %s AS s WHERE %s%s', columns, source.source_table, tbl_repl._sent_as_known(target, source), ' AND (' || target.filter_expr || ')')
                           ELSE format('SELECT %s FROM (%s) AS u JOIN %s AS s ON %s', columns, keys, source.source_table, matches) END;
        -- DISTINCT by sorting, as in _loads
        SELECT string_agg(format('r.c%s', n), ', ' ORDER BY n) INTO listing FROM generate_series(1, cardinality(target.sent_columns)) AS n;
        batch_query := CASE WHEN NOT whole AND ops <> '{I}' THEN format(
            'SELECT CASE WHEN r.found IS NULL THEN u.tbl_repl_key END, %s '
            'FROM (SELECT DISTINCT ON (x.tbl_repl_key COLLATE "C") x.tbl_repl_key FROM (%s) AS x ORDER BY x.tbl_repl_key COLLATE "C") AS u '
            'LEFT JOIN LATERAL (SELECT true, %s FROM %s AS s WHERE %s) AS r (found, %s) ON true',
            listing, keys, columns, source.source_table, matches, replace(listing, 'r.', '')) END;
        -- a domain may not take the NULLs beside a key that is gone
        stage := format('CREATE TEMP TABLE tbl_repl_rows_%s ON COMMIT DROP AS SELECT NULL::text AS tbl_repl_gone, %s FROM %s WITH NO DATA', target_id,
            (SELECT string_agg(concat(quote_ident(u.name), '::' || (r.c ->> 'domain_of'), ' AS ', quote_ident(u.name)), ', ' ORDER BY u.n)
             FROM unnest(target.sent_columns) WITH ORDINALITY AS u (name, n)
             LEFT JOIN LATERAL (SELECT c FROM jsonb_array_elements(target.remote -> 'columns') AS c WHERE c ->> 'name' = u.name::text) AS r ON true),
            dst_table);
        SELECT count(*) = 1 AND NOT bool_or(k.by_text) AS plain, min(k.type) AS type, min(k.equals) AS equals, min(k.name::text) AS name
        INTO single FROM tbl_repl._dst_key_parts(target) AS k;
        IF single.plain AND amount <= tbl_repl._keys_per_array() THEN
            -- the index takes a list at once, sorted, which is several times as quick as a join
            gone := NULL;
            remove := format('DELETE FROM %s AS d WHERE d.%I %s ANY (ARRAY(SELECT (g.tbl_repl_gone)::%s FROM pg_temp.tbl_repl_rows_%s AS g '
                             'WHERE g.tbl_repl_gone IS NOT NULL))', dst_table, single.name, single.equals, single.type, target_id);
        ELSE
            gone := format('CREATE TEMP TABLE tbl_repl_gone_%1$s ON COMMIT DROP AS SELECT tbl_repl_gone AS k FROM pg_temp.tbl_repl_rows_%1$s '
                           'WHERE tbl_repl_gone IS NOT NULL', target_id);
            remove := format('ANALYZE pg_temp.tbl_repl_gone_%s; DELETE FROM %s AS d USING pg_temp.tbl_repl_gone_%s AS g WHERE %s',
                target_id, dst_table, target_id,
                (SELECT string_agg(format('d.%I %s (%s)::%s', k.name, k.equals,
                                          CASE WHEN cardinality(target.dst_keys) = 1 THEN 'g.k' ELSE format('g.k::json ->> %s', k.n - 1) END, k.type),
                                   ' AND ' ORDER BY k.n)
                 FROM tbl_repl._dst_key_parts(target) AS k));
        END IF;
        merge := format('%s SELECT %s FROM pg_temp.tbl_repl_rows_%s WHERE tbl_repl_gone IS NULL%s', left(parts.head, length(parts.head) - length(' VALUES ')),
                        dst_columns, target_id, parts.tail);
        RETURN NEXT;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._bulk_jobs(integer[]) IS
    'what the worker reads and runs to ship a large batch by COPY';

-- Keys may be long, and the target has the array in memory.
CREATE OR REPLACE FUNCTION tbl_repl._keys_per_array() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1000000;
COMMENT ON FUNCTION tbl_repl._keys_per_array() IS 'how many keys of deleted rows the target gets in one array at the most';

CREATE OR REPLACE FUNCTION tbl_repl._dst_columns(target tbl_repl.target)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT string_agg(quote_ident(c), ', ' ORDER BY n) FROM unnest(target.sent_columns) WITH ORDINALITY AS c (c, n)
$function$;
COMMENT ON FUNCTION tbl_repl._dst_columns(tbl_repl.target) IS 'the columns of the target''s table that are sent, quoted';

CREATE OR REPLACE FUNCTION tbl_repl._sent_list(target tbl_repl.target, is_binary boolean)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT string_agg(CASE WHEN is_binary THEN e ELSE format('(%s)::text', e) END, ', ' ORDER BY n)
    FROM unnest(target.sent_exprs) WITH ORDINALITY AS e (e, n)
$function$;
COMMENT ON FUNCTION tbl_repl._sent_list(tbl_repl.target, boolean) IS 'the expressions that are sent, as a SELECT list';

-- Built-in types only: others may differ although their names are the same.
CREATE OR REPLACE FUNCTION tbl_repl._may_copy_binary(target tbl_repl.target, source tbl_repl.source)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT (target.remote ->> 'version')::integer / 10000 = current_setting('server_version_num')::integer / 10000
       AND NOT EXISTS (
           SELECT FROM unnest(target.sent_columns, tbl_repl._sent_types(target, source.source_table)) AS x (name, type_id)
           LEFT JOIN LATERAL (SELECT c FROM jsonb_array_elements(target.remote -> 'columns') AS c WHERE c ->> 'name' = x.name::text) AS r ON true
           WHERE x.type_id = 0 OR x.type_id >= 16384 OR format_type(x.type_id, -1) IS DISTINCT FROM r.c ->> 'type')
$function$;
COMMENT ON FUNCTION tbl_repl._may_copy_binary(tbl_repl.target, tbl_repl.source) IS
    'whether source and target have the same types in the same major version';

-- _bulk_done(snapshot, counts): the batch that was read in the snapshot is committed on the target;
-- counts: {"target_id": rows}, of every job.  The caller holds ship of the targets.
-- SECURITY DEFINER: empties segments of the queue (_rotate), which takes their owner.
CREATE OR REPLACE FUNCTION tbl_repl._bulk_done(
    snapshot pg_snapshot,
    counts   jsonb
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    PERFORM tbl_repl._advance(c.key::integer, c.value::bigint, snapshot) FROM jsonb_each_text(counts) AS c ORDER BY c.key::integer;
    PERFORM tbl_repl._back_to_ok(c::integer) FROM jsonb_object_keys(counts) AS c ORDER BY c::integer;
    PERFORM tbl_repl._rotate();
END
$function$;
COMMENT ON FUNCTION tbl_repl._bulk_done(pg_snapshot, jsonb) IS
    'moves the positions after a batch that went by COPY';

-- _bulk_session(timeout): application_name, settings and lease (of the deadline $1) of the worker's own connection to the
-- target.  Named like a dblink connection of the backend that holds the locks, so that whoever comes after
-- its death ends it first.
CREATE OR REPLACE FUNCTION tbl_repl._bulk_session(timeout interval, OUT application_name text, OUT settings text, OUT place_query text, OUT lease text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('tbl_repl %s %s.%s.%s', tbl_repl.node_name(), pg_backend_pid(),
                  to_hex(extract(epoch FROM pg_postmaster_start_time())::bigint), 'b01d'),
           format('SET statement_timeout = 0; SET lock_timeout = %s; %s; %s; %s',
                  ceil(extract(epoch FROM timeout) * 800), tbl_repl._text_session(), tbl_repl._transaction_session(), tbl_repl._origin_session()),
           tbl_repl._place_query(), 'SELECT ' || tbl_repl._in_time('$1')
$function$;
COMMENT ON FUNCTION tbl_repl._bulk_session(interval) IS
    'application_name and settings of the worker''s connection to a target, what tells where it leads, and the end of its messages';

-- One running server and database; a copy of it has been started at another moment.
CREATE OR REPLACE FUNCTION tbl_repl._place_query() RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN 'SELECT pg_catalog.format(''%s %s'', extract(epoch FROM pg_catalog.pg_postmaster_start_time()), d.oid) '
       'FROM pg_catalog.pg_database AS d WHERE d.datname = pg_catalog.current_database()';
COMMENT ON FUNCTION tbl_repl._place_query() IS 'query that tells on a target which server and database it is';

-- Opens the source's own connection to the target, which ends what a drainer that has died has left there.  Returns where it
-- leads: for the worker the same host and port may be another server.
-- SECURITY DEFINER: connects as the target's owner.
CREATE OR REPLACE FUNCTION tbl_repl._bulk_connect(target_id integer)
RETURNS text
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    conn     text;
    deadline timestamptz;
BEGIN
    SELECT tbl_repl._connection_name(t.server, t.owner, t.timeout), clock_timestamp() + t.timeout * 2 INTO conn, deadline
    FROM tbl_repl.target AS t WHERE t.target_id = _bulk_connect.target_id;
    PERFORM tbl_repl._connect_alive(target_id, conn, deadline);
    -- what the worker has left there when it lost its own connection
    PERFORM tbl_repl._call(conn, format('SELECT pg_catalog.count(pg_catalog.pg_terminate_backend(a.pid)) FROM pg_catalog.pg_stat_activity AS a '
                                        'WHERE a.datname = pg_catalog.current_database() AND a.usename = current_user AND a.application_name = %L',
                                        (tbl_repl._bulk_session('0')).application_name), deadline);
    RETURN tbl_repl._call(conn, tbl_repl._place_query(), deadline);
END
$function$;
COMMENT ON FUNCTION tbl_repl._bulk_connect(integer) IS
    'connects to a target before the worker does, so that older sessions are gone';
