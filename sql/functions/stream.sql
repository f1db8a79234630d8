-- Stream: many rows to one connection, in one remote transaction, in messages of bounded size.
--
-- Used by the flush for large transactions and whole tables, and by replay for what is no small batch (_small_batch)
-- and does not go by COPY (bulk.sql).  All tables are read in the snapshot of one statement, which is fetched from
-- message by message: memory does not grow with the number of rows.  While the target works on one message the next one
-- is rendered.

-- How many rows of a table make a message of about two megabytes, a thousand at the most.  Pages and rows
-- as last counted together: the present size over an old count would tell nothing.
CREATE OR REPLACE FUNCTION tbl_repl._chunk_rows(source_table regclass)
RETURNS integer
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RETURN coalesce(
        (SELECT greatest(1, least(tbl_repl._rows_per_message(),
                    2000000 / (sum((c.relpages + coalesce(t.relpages, 0))::numeric * current_setting('block_size')::int) / sum(c.reltuples)::numeric)))::integer
         FROM (SELECT source_table AS relid UNION SELECT t.relid FROM pg_partition_tree(source_table) AS t) AS p
         JOIN pg_class AS c ON c.oid = p.relid
         LEFT JOIN pg_class AS t ON t.oid = c.reltoastrelid
         WHERE c.reltuples > 0 AND c.relpages > 0),
        tbl_repl._rows_per_message());
END
$function$;
COMMENT ON FUNCTION tbl_repl._chunk_rows(regclass) IS 'rows of a table that make a message of bounded size';

-- _loads(target, ops, copies, keys_from): ops: the operations that have occurred ('T' meaning a TRUNCATE of
-- the whole table); keys_from: what follows FROM to give rows c of the queue or the stash.
-- After TRUNCATE the state is the whole table: an insert that has overtaken it must not be lost.
-- A TRUNCATE with keys is one of a partition, or of rows that share the target's table with others.
CREATE OR REPLACE FUNCTION tbl_repl._loads(
    target    tbl_repl.target,
    ops       "char"[],
    copies    boolean,
    keys_from text
)
RETURNS SETOF tbl_repl.load
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    source    tbl_repl.source%ROWTYPE;
    truncated boolean;
    listing   text;
    wanted    "char"[];
BEGIN
    SELECT * INTO STRICT source FROM tbl_repl.source AS s WHERE s.source_id = target.source_id;
    truncated := coalesce('T' = ANY (ops), false) AND 'truncate' = ANY (target.operations)
                 AND NOT tbl_repl._truncates_by_key(target.target_id);
    IF truncated OR copies THEN
        RETURN QUERY SELECT target.target_id, source.fk_rank,
            format('WITH RECURSIVE p (keys) AS (SELECT tbl_repl.page_%1$s(NULL, %2$s) UNION ALL '
                   'SELECT tbl_repl.page_%1$s(p.keys[cardinality(p.keys)], %2$s) FROM p WHERE cardinality(p.keys) = %2$s) '
                   'SELECT p.keys FROM p WHERE p.keys IS NOT NULL',
                   target.target_id, tbl_repl._chunk_rows(source.source_table)),
            true, truncated, NULL::text;
    END IF;
    IF truncated THEN
        RETURN;
    END IF;
    -- Sorted: the planner knows nothing of their number, and a hash that outgrows its memory unforeseen takes minutes.
    listing := 'SELECT array_agg(e.k) AS keys FROM (SELECT d.k, (row_number() OVER () - 1) / %s AS n '
               'FROM (SELECT DISTINCT ON (x.k COLLATE "C") x.k FROM (SELECT unnest(c.keys) AS k FROM %s AND c.op = ANY (%L)) AS x '
               'ORDER BY x.k COLLATE "C") AS d) AS e GROUP BY e.n ORDER BY e.n';
    IF target.operations @> '{insert,update,delete,truncate}' THEN
        RETURN QUERY SELECT target.target_id, source.fk_rank,
            format(listing, tbl_repl._chunk_rows(source.source_table), keys_from, '{I,U,K,D,T,B}'), true, false, NULL::text;
        RETURN;
    END IF;
    wanted := array_remove(ARRAY[CASE WHEN 'insert' = ANY (target.operations) THEN 'I' END,
                                 CASE WHEN 'update' = ANY (target.operations) THEN 'U' END]::"char"[], NULL);
    IF cardinality(wanted) > 0 THEN
        RETURN QUERY SELECT target.target_id, source.fk_rank,
            format(listing, tbl_repl._chunk_rows(source.source_table), keys_from, wanted),
            'delete' = ANY (target.operations), false, NULL::text;
    END IF;
    wanted := array_remove(ARRAY[CASE WHEN 'update' = ANY (target.operations) THEN 'K' END,
                                 CASE WHEN 'delete' = ANY (target.operations) THEN 'D' END,
                                 CASE WHEN 'truncate' = ANY (target.operations) THEN 'T' END]::"char"[], NULL);
    IF cardinality(wanted) > 0 THEN
        RETURN QUERY SELECT target.target_id, source.fk_rank,
            format(listing, tbl_repl._chunk_rows(source.source_table), keys_from, wanted), true, false, NULL::text;
    END IF;
END
$function$;
COMMENT ON FUNCTION tbl_repl._loads(tbl_repl.target, "char"[], boolean, text) IS
    'what a set of changes means for one target';

CREATE OR REPLACE FUNCTION tbl_repl._set_origin(origin text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT format('SET LOCAL tbl_repl.origin = %L', origin) WHERE origin IS NOT NULL
$function$;
COMMENT ON FUNCTION tbl_repl._set_origin(text) IS
    'statement that tells the target where the changes that follow were made';

-- _loads_by_origin(target, ops, keys_from): what a batch of the queue means for a target, a load for each node where
-- changes were made.  A row goes with the origin of its last change, for its state is that one's: with an earlier one
-- a node would get back its own change over a newer one, or not get one made elsewhere.
CREATE OR REPLACE FUNCTION tbl_repl._loads_by_origin(target tbl_repl.target, ops "char"[], keys_from text)
RETURNS SETOF tbl_repl.load
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    origins text[];
    node    text;
BEGIN
    IF target.forward = 'any' THEN
        EXECUTE format('SELECT array_agg(DISTINCT c.origin) FROM %s', keys_from) INTO origins;
    END IF;
    IF origins IS NULL OR origins = '{NULL}' THEN
        RETURN QUERY SELECT l.* FROM tbl_repl._loads(target, ops, false, keys_from) AS l;
        RETURN;
    END IF;
    FOREACH node IN ARRAY origins LOOP
        RETURN QUERY SELECT l.target_id, l.fk_rank, l.chunks, l.absent, l.truncate, coalesce(node, tbl_repl.node_name())
        FROM tbl_repl._loads(target, ops, false, format(
            '(SELECT f.op, ARRAY[f.key] AS keys FROM (SELECT DISTINCT ON (k.key) k.key, c.op, c.origin FROM (SELECT c.* FROM %s) AS c '
            'CROSS JOIN LATERAL unnest(c.keys) AS k (key) ORDER BY k.key, c.captured_at DESC) AS f WHERE f.origin IS NOT DISTINCT FROM %L) AS c WHERE true',
            keys_from, node)) AS l;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._loads_by_origin(tbl_repl.target, "char"[], text) IS
    'what a batch of the queue means for one target, by the nodes where changes were made';

-- The orders in which the statements of a remote transaction may be sent.  Rows always from those that are referred to,
-- deletions from those that refer to others.
CREATE OR REPLACE FUNCTION tbl_repl._variants() RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN ARRAY['deletes first', 'upserts first', 'clear, deletes first', 'clear, upserts first', 'free, upserts first'];
COMMENT ON FUNCTION tbl_repl._variants() IS
    'orders of statements; before anything else, clear: unique values that wander between rows are given up, free: what no row refers to is deleted';

-- Errors that another order of statements, or the rest of a batch, may cure.
CREATE OR REPLACE FUNCTION tbl_repl._is_about_other_rows(code text)
RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN code IN ('23503', '23001', '23505', '23P01');
COMMENT ON FUNCTION tbl_repl._is_about_other_rows(text) IS 'whether an error is about a row beside others';

-- _next_variant(variant, code, cascades): the first one (variant NULL), and what may help after an error; NULL: nothing.
-- Deletions first, for the values that they free; children that move to a new parent want the rows before (23503, and 23001
-- for RESTRICT from PostgreSQL 18 on), unique values that wander between rows want to be given up (23505, 23P01).
-- cascades: never deletions first.  Rows that moved away from one that goes would be gone or changed by then; they are written
-- again, but not what refers to them, which nobody has touched on the source.  What no row refers to may go before, for its values.
CREATE OR REPLACE FUNCTION tbl_repl._next_variant(variant text, code text, cascades boolean)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN variant IS NULL THEN CASE WHEN cascades THEN 'upserts first' ELSE 'deletes first' END
                -- 23514: a check does not take the value that was put in the place of a unique one
                WHEN cascades AND (variant = 'upserts first' AND code IN ('23503', '23001')
                                   OR variant = 'clear, upserts first' AND (tbl_repl._is_about_other_rows(code) OR code = '23514'))
                THEN 'free, upserts first'
                WHEN code IN ('23503', '23001')
                THEN CASE variant WHEN 'deletes first' THEN 'upserts first' WHEN 'clear, deletes first' THEN 'clear, upserts first' END
                WHEN code IN ('23505', '23P01')
                THEN CASE variant WHEN 'deletes first' THEN 'clear, deletes first' WHEN 'upserts first' THEN 'clear, upserts first' END END
$function$;
COMMENT ON FUNCTION tbl_repl._next_variant(text, text, boolean) IS
    'in which order to send the statements of a remote transaction, after an error in another one';

CREATE OR REPLACE FUNCTION tbl_repl._cascades(targets integer[])
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT coalesce(bool_or(t.cascades), false) FROM tbl_repl.target AS t WHERE t.target_id = ANY (targets)
$function$;
COMMENT ON FUNCTION tbl_repl._cascades(integer[]) IS 'whether deletions from some targets take other rows along';

-- Targets whose rows would go along with one that is deleted from a target, or be changed, and could not be had back: what refers to
-- them goes, too, and nobody has touched it on the source; or they hold what is not sent; or they refer to other columns than the key,
-- and have not been touched themselves where it was only the key that changed.  match: that a row r refers to a row d.
CREATE OR REPLACE FUNCTION tbl_repl._taken_along(target_id integer)
RETURNS TABLE (target_id integer, dst_table text, match text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT c.target_id, tbl_repl._dst_table(c), f.f ->> 'match'
    FROM tbl_repl.target AS p
    JOIN tbl_repl.target AS c ON c.server = p.server AND c.target_id <> p.target_id AND c.operations @> '{update,delete}'
    CROSS JOIN LATERAL jsonb_array_elements(c.remote -> 'follows') AS f (f)
    WHERE p.target_id = _taken_along.target_id AND p.cascades AND p.on_conflict = 'overwrite'
      AND f.f ->> 'schema' = p.dst_schema::text AND f.f ->> 'name' = p.dst_name::text
      AND (f.f ->> 'action' = 'c' AND (c.cascades OR tbl_repl._has_own_columns(c) OR c.on_conflict <> 'overwrite')
           OR NOT (f.f -> 'columns' @> to_jsonb(p.dst_keys) AND f.f -> 'columns' <@ to_jsonb(p.dst_keys)))
$function$;
COMMENT ON FUNCTION tbl_repl._taken_along(integer) IS 'targets whose rows are lost when they go along with one of another target';

-- Then a deletion has to wait for the rows that have left the one that goes: they may be still to come.  partial: also those of the
-- same targets.
CREATE OR REPLACE FUNCTION tbl_repl._is_torn(targets integer[], partial boolean DEFAULT false)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT EXISTS (
        SELECT FROM tbl_repl.target AS t
        CROSS JOIN LATERAL tbl_repl._taken_along(t.target_id) AS c
        JOIN tbl_repl.target_state AS st ON st.target_id = c.target_id
        WHERE t.target_id = ANY (targets) AND t.cascades
          AND (partial OR EXISTS (SELECT FROM tbl_repl.quarantined AS q WHERE q.target_id = c.target_id)
               OR c.target_id <> ALL (targets) AND (st.status <> 'ok' OR tbl_repl._has_pending(c.target_id))))
$function$;
COMMENT ON FUNCTION tbl_repl._is_torn(integer[], boolean) IS
    'whether rows that deletions from some targets would take along wait elsewhere';

-- The same for a transaction in flight: parcels, what it ships; queued, targets for which it queues.  Sync ones are shipped to.
CREATE OR REPLACE FUNCTION tbl_repl._torn_from(parcels tbl_repl.parcel[], queued integer[])
RETURNS integer[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT coalesce(array_agg(DISTINCT p.target_id), '{}')
    FROM unnest(parcels) AS p
    CROSS JOIN LATERAL tbl_repl._taken_along(p.target_id) AS a
    JOIN tbl_repl.target_state AS st ON st.target_id = a.target_id
    LEFT JOIN unnest(parcels) AS c ON c.target_id = a.target_id
    WHERE NOT p.sync
      AND (EXISTS (SELECT FROM tbl_repl.quarantined AS q WHERE q.target_id = a.target_id)
           OR c.conn <> p.conn
           OR c.conn IS NULL AND (a.target_id = ANY (queued) OR st.status <> 'ok' OR tbl_repl._has_pending(a.target_id)))
$function$;
COMMENT ON FUNCTION tbl_repl._torn_from(tbl_repl.parcel[], integer[]) IS
    'targets from which a transaction must not delete, for rows that would be taken along go another way';

-- The one statement that reads everything, in the order in which it has to be sent.
CREATE OR REPLACE FUNCTION tbl_repl._stream_query(
    loads   tbl_repl.load[],
    mine    boolean,
    variant text
)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT CASE WHEN cardinality(loads) = 1 AND variant = 'deletes first'
        THEN format('SELECT concat_ws(''; '', %L, r.deletes, r.upserts) AS statement, r.rows::bigint AS rows, %s AS target_id FROM (%s) AS c CROSS JOIN LATERAL tbl_repl.render_%s(c.keys, %L, %L, ''plain'') AS r',
                    tbl_repl._set_origin(loads[1].origin), loads[1].target_id, loads[1].chunks, loads[1].target_id, mine, loads[1].absent)
        ELSE (
            SELECT string_agg(format('(SELECT CASE WHEN r.%1$I <> '''' THEN concat_ws(''; '', %2$L, r.%1$I) END AS statement, %3$s AS rows, %5$s AS target_id FROM (%4$s) AS c CROSS JOIN LATERAL tbl_repl.render_%5$s(c.keys, %6$L, %7$L, %8$L) AS r)',
                                     step.part,
                                     -- who comes after another origin says its own
                                     tbl_repl._set_origin(CASE WHEN EXISTS (SELECT FROM unnest(loads) AS o WHERE o.origin IS NOT NULL)
                                                               THEN coalesce(l.origin, tbl_repl.node_name()) END),
                                     CASE step.part WHEN 'upserts' THEN 'r.rows::bigint' ELSE '0::bigint' END,
                                     l.chunks, l.target_id, mine, l.absent, step.form),
                              ' UNION ALL ' ORDER BY step.n, CASE step.part WHEN 'deletes' THEN -l.fk_rank ELSE l.fk_rank END, l.target_id)
            FROM unnest(loads) AS l
            JOIN (VALUES ('deletes first', 1, 'deletes', 'plain'), ('deletes first', 2, 'upserts', 'plain'),
                         ('upserts first', 1, 'upserts', 'plain'), ('upserts first', 2, 'deletes', 'plain'),
                         ('clear, deletes first', 1, 'deletes', 'aside'), ('clear, deletes first', 2, 'deletes', 'plain'), ('clear, deletes first', 3, 'upserts', 'aside'),
                         ('clear, upserts first', 1, 'deletes', 'aside'), ('clear, upserts first', 2, 'upserts', 'aside'), ('clear, upserts first', 3, 'deletes', 'plain'),
                         ('free, upserts first', 1, 'deletes', 'free'), ('free, upserts first', 2, 'upserts', 'plain'), ('free, upserts first', 3, 'deletes', 'plain')
                 ) AS step (variant, n, part, form) ON step.variant = _stream_query.variant) END
$function$;
COMMENT ON FUNCTION tbl_repl._stream_query(tbl_repl.load[], boolean, text) IS
    'the query that renders a remote transaction in one of the _variants';

-- STABLE: the cursor reads in the snapshot of the statement that calls.
CREATE OR REPLACE FUNCTION tbl_repl._open_stream(
    loads   tbl_repl.load[],
    mine    boolean,
    variant text
)
RETURNS refcursor
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    portal refcursor;
BEGIN
    OPEN portal FOR EXECUTE tbl_repl._stream_query(loads, mine, variant);
    RETURN portal;
END
$function$;
COMMENT ON FUNCTION tbl_repl._open_stream(tbl_repl.load[], boolean, text) IS
    'a cursor over the statements of a remote transaction';

-- _stream(conn, loads, mine, timeout, variant, variants): begins a remote transaction and sends everything; does not
-- commit.  Returns the number of keys, {"target_id": keys}.  Errors: the target's; the caller ends the connection.
--   variants: a cursor that has for each variant, in turn, a cursor over its statements, all in one snapshot;
--             NULL: read now.
-- A cancel takes effect at once: nothing of this is committed.
CREATE OR REPLACE FUNCTION tbl_repl._stream(
    conn    text,
    loads   tbl_repl.load[],
    mine    boolean,
    timeout interval,
    variant text,
    variants refcursor
)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    portal    refcursor;
    opened    text;
    statement text;
    rows      bigint;
    target_id integer;
    counts    jsonb := '{}';
    in_flight boolean := true;
BEGIN
    PERFORM tbl_repl._send(conn, 'BEGIN; SET CONSTRAINTS ALL DEFERRED');
    IF EXISTS (SELECT FROM unnest(loads) AS l WHERE l.truncate) THEN
        PERFORM tbl_repl._receive(conn, clock_timestamp() + timeout, false, true);
        PERFORM tbl_repl._truncate(conn, loads, timeout);
        in_flight := false;
    END IF;
    IF variants IS NULL THEN
        portal := tbl_repl._open_stream(loads, mine, variant);
    END IF;
    WHILE variants IS NOT NULL AND opened IS DISTINCT FROM variant LOOP
        FETCH variants INTO opened, portal;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'no stream of variant %', variant;
        END IF;
        IF opened <> variant THEN
            CLOSE portal;  -- it reads the queue, which could not be emptied behind us
        END IF;
    END LOOP;
    LOOP
        FETCH portal INTO statement, rows, target_id;
        EXIT WHEN NOT FOUND;
        counts := tbl_repl._add_count(counts, target_id, rows);
        CONTINUE WHEN coalesce(statement, '') = '';
        IF in_flight THEN
            PERFORM tbl_repl._receive(conn, clock_timestamp() + timeout, false, true);
        END IF;
        PERFORM tbl_repl._send(conn, statement);
        in_flight := true;
    END LOOP;
    CLOSE portal;
    IF in_flight THEN
        PERFORM tbl_repl._receive(conn, clock_timestamp() + timeout, false, true);
    END IF;
    RETURN counts;
END
$function$;
COMMENT ON FUNCTION tbl_repl._stream(text, tbl_repl.load[], boolean, interval, text, refcursor) IS
    'sends the state of many keys in one remote transaction, without committing it';

CREATE OR REPLACE FUNCTION tbl_repl._add_count(counts jsonb, target_id integer, rows bigint)
RETURNS jsonb
LANGUAGE sql IMMUTABLE
RETURN jsonb_set(counts, ARRAY[target_id::text], to_jsonb(coalesce((counts ->> target_id::text)::bigint, 0) + rows));
COMMENT ON FUNCTION tbl_repl._add_count(jsonb, integer, bigint) IS 'adds to {"target_id": rows}';

-- All tables in one command, so that foreign keys between them do not matter; rows are deleted where a
-- foreign key from elsewhere does, unless it would take rows there along (23503): they are the other table's affair.
CREATE OR REPLACE FUNCTION tbl_repl._truncate(
    conn    text,
    loads   tbl_repl.load[],
    timeout interval
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    names   text[];
    tables  text;
    deletes text;
BEGIN
    SELECT array_agg(d.name), string_agg(format('DELETE FROM %s', d.name), '; ' ORDER BY d.fk_rank DESC)
    INTO names, deletes
    FROM (SELECT tbl_repl._dst_table(t) AS name, max(l.fk_rank) AS fk_rank
          FROM unnest(loads) AS l JOIN tbl_repl.target AS t ON t.target_id = l.target_id
          WHERE l.truncate GROUP BY 1) AS d;
    tables := array_to_string(names, ', ');
    BEGIN
        PERFORM tbl_repl._call(conn, format('SAVEPOINT tbl_repl; TRUNCATE %s', tables), clock_timestamp() + timeout);
    EXCEPTION WHEN feature_not_supported OR insufficient_privilege THEN
        IF tbl_repl._call(conn, format('ROLLBACK TO tbl_repl; SELECT pg_catalog.count(*) FROM pg_catalog.pg_constraint AS f WHERE f.contype = ''f'' '
                                       -- without the copies for partitions
                                       'AND f.conparentid = 0 AND f.confdeltype IN (''c'', ''n'', ''d'') AND f.confrelid = ANY (%1$L::pg_catalog.regclass[]) AND f.conrelid <> ALL (%1$L::pg_catalog.regclass[])',
                                       names), clock_timestamp() + timeout) <> '0' THEN
            RAISE EXCEPTION USING
                ERRCODE = 'foreign_key_violation',
                MESSAGE = format('rows of other tables would go with those of %s', tables);
        END IF;
        -- one that is checked at the end belongs to this, and not to what is sent afterwards
        PERFORM tbl_repl._call(conn, format('%s; SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED', deletes), clock_timestamp() + timeout);
    END;
END
$function$;
COMMENT ON FUNCTION tbl_repl._truncate(text, tbl_repl.load[], interval) IS
    'empties the targets'' tables';

CREATE OR REPLACE FUNCTION tbl_repl._stream_any_way(
    conn    text,
    loads   tbl_repl.load[],
    mine    boolean,
    timeout interval,
    variants refcursor DEFAULT NULL
)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    cascades     boolean := tbl_repl._cascades(ARRAY(SELECT l.target_id FROM unnest(loads) AS l));
    variant      text := tbl_repl._next_variant(NULL, NULL, cascades);
    counts       jsonb;
    code         text;
    first_code   text;
    first_text   text;
    first_detail text;
    first_hint   text;
BEGIN
    LOOP
        BEGIN
            counts := tbl_repl._stream(conn, loads, mine, timeout, variant, variants);
            -- what is deferred on the target has to be found out while it can still be done another way
            PERFORM tbl_repl._send(conn, 'SET CONSTRAINTS ALL IMMEDIATE');
            PERFORM tbl_repl._receive(conn, clock_timestamp() + timeout, false, true);
            RETURN counts;
        EXCEPTION WHEN foreign_key_violation OR restrict_violation OR unique_violation OR exclusion_violation OR check_violation THEN
            code := SQLSTATE;
            IF first_code IS NULL THEN
                GET STACKED DIAGNOSTICS first_code = RETURNED_SQLSTATE, first_text = MESSAGE_TEXT,
                    first_detail = PG_EXCEPTION_DETAIL, first_hint = PG_EXCEPTION_HINT;
            END IF;
        END;
        PERFORM tbl_repl._call(conn, 'ROLLBACK', clock_timestamp() + timeout);
        variant := tbl_repl._next_variant(variant, code, cascades);
        IF variant IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = first_code, MESSAGE = first_text, DETAIL = first_detail, HINT = first_hint;
        END IF;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._stream_any_way(text, tbl_repl.load[], boolean, interval, refcursor) IS
    'streams, in another order of statements where constraints of the target ask for it';

CREATE OR REPLACE FUNCTION tbl_repl._commit(conn text, timeout interval)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    deadline timestamptz := clock_timestamp() + timeout;
BEGIN
    PERFORM tbl_repl._call(conn, 'SET CONSTRAINTS ALL IMMEDIATE' || tbl_repl._lease(deadline) || '; COMMIT', deadline, true);
EXCEPTION WHEN connection_exception THEN
    IF SQLSTATE <> '08000' THEN
        -- nobody knows what became of it: it must not come after something newer
        PERFORM tbl_repl._outlive(deadline);
    END IF;
    RAISE;
END
$function$;
COMMENT ON FUNCTION tbl_repl._commit(text, interval) IS 'commits the remote transaction, within the lease';

CREATE OR REPLACE FUNCTION tbl_repl._outlive(deadline timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    WHILE clock_timestamp() <= deadline LOOP
        BEGIN
            PERFORM pg_sleep(greatest(0.001, extract(epoch FROM deadline - clock_timestamp())));
        EXCEPTION WHEN query_canceled THEN
            NULL;
        END;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION tbl_repl._outlive(timestamptz) IS
    'waits until the lease of a lost message is over, also through a cancel';
