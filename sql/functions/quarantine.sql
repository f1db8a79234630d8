-- Quarantine: finds the rows that a target rejects, keeps them apart, and lets them go when they are accepted.
--
-- Promises that a row that is rejected holds up no other, and is kept with the error that the target gave; whether an error
-- speaks of a row, of the target or of the moment is decided here.

-- stubborn: an error that is otherwise the target's, see _is_stubborn.
CREATE OR REPLACE FUNCTION tbl_repl._apply_by_halves(
    conn     text,
    timeout  interval,
    loads    tbl_repl.load[],
    stubborn text,
    OUT shipped   bigint,
    OUT by_target jsonb,
    OUT broken    integer[]
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item     record;
    portal   refcursor;
    keys     text[];
    size     integer;
    slow     integer;
    began    timestamptz;
    rejected    tbl_repl.poison[];
    poison   tbl_repl.poison[] := '{}';
    left_bad tbl_repl.poison[];
    progress boolean;
    counted  bigint;
    turns    integer := CASE WHEN tbl_repl._cascades(ARRAY(SELECT l.target_id FROM unnest(loads) AS l)) THEN 2 ELSE 1 END;
    carried  boolean := EXISTS (SELECT FROM unnest(loads) AS l WHERE l.origin IS NOT NULL);
    kept     integer[] := '{}';  -- targets whose tables cannot be emptied, for rows that stay refer to some of theirs
    cleared  record;
BEGIN
    shipped := 0;
    by_target := '{}';
    broken := '{}';
    PERFORM tbl_repl._call(conn, 'BEGIN', clock_timestamp() + timeout);
    FOR item IN
        SELECT l.target_id, tbl_repl._dst_table(t) AS dst_table
        FROM unnest(loads) AS l JOIN tbl_repl.target AS t ON t.target_id = l.target_id WHERE l.truncate
    LOOP
        BEGIN
            PERFORM tbl_repl._call(conn, format('SAVEPOINT tbl_repl; DELETE FROM %s WHERE false; RELEASE tbl_repl', item.dst_table),
                                   clock_timestamp() + timeout);
            CONTINUE;
        EXCEPTION WHEN assert_failure OR OTHERS THEN
            IF NOT tbl_repl._is_definition_error(SQLSTATE) THEN
                RAISE;
            END IF;
            broken := array_append(broken, item.target_id);
            PERFORM tbl_repl._target_failed(item.target_id, SQLSTATE, SQLERRM);
        END;
        PERFORM tbl_repl._call(conn, 'ROLLBACK TO tbl_repl; RELEASE tbl_repl', clock_timestamp() + timeout);
    END LOOP;
    loads := ARRAY(SELECT l FROM unnest(loads) AS l WHERE l.target_id <> ALL (broken));
    IF EXISTS (SELECT FROM unnest(loads) AS l WHERE l.truncate) AND tbl_repl._refused_truncate(conn, loads, timeout) IS NOT NULL THEN
        FOR item IN SELECT l.target_id, tbl_repl._refused_truncate(conn, ARRAY[l], timeout) AS refused
                    FROM unnest(loads) AS l WHERE l.truncate ORDER BY l.fk_rank DESC, l.target_id LOOP
            CONTINUE WHEN item.refused IS NULL;
            -- too many rows for one DELETE, where the target does not take a TRUNCATE; or some are referred to
            IF item.refused[1] IN ('23503', '23001', '57014') THEN
                -- as a state: without what is only there, and with what is here
                kept := array_append(kept, item.target_id);
                CONTINUE;
            END IF;
            -- a person is needed, the queue is kept
            broken := array_append(broken, item.target_id);
            PERFORM tbl_repl._target_failed(item.target_id, item.refused[1], 'TRUNCATE: ' || item.refused[2]);
        END LOOP;
    END IF;
    cleared := tbl_repl._clear_kept(conn, timeout, kept, by_target);
    shipped := cleared.deleted;
    by_target := cleared.by_target;
    -- Where deletions take other rows along: rows first, of all tables; then everything, those that refer to others first.
    FOR item IN SELECT l.*, n AS turn FROM unnest(loads) AS l, generate_series(1, turns) AS n
                ORDER BY n, CASE n WHEN 1 THEN l.fk_rank ELSE -l.fk_rank END, l.target_id LOOP
        CONTINUE WHEN item.target_id = ANY (broken);  -- by another load of it
        counted := 0;
        slow := 0;
        size := tbl_repl._rows_per_message();
        IF carried THEN
            PERFORM tbl_repl._call(conn, tbl_repl._set_origin(coalesce(item.origin, tbl_repl.node_name())), clock_timestamp() + timeout);
        END IF;
        OPEN portal FOR EXECUTE item.chunks;
        LOOP
            IF coalesce(cardinality(keys), 0) = 0 THEN
                FETCH portal INTO keys;
                EXIT WHEN NOT FOUND;
            END IF;
            began := clock_timestamp();
            rejected := tbl_repl._apply_keys(conn, timeout, item.target_id, item.absent AND item.turn = turns, keys[:size], true, stubborn);
            IF cardinality(rejected) > 0 AND rejected[1].key IS NULL AND rejected[1].code = '57014' THEN
                -- Each miss costs nearly timeout, so by eighths, and larger again as soon as there is room.
                size := greatest(1, least(size, cardinality(keys)) / 8);
                CONTINUE;
            END IF;
            slow := slow + (SELECT count(*) FROM unnest(rejected) AS r WHERE r.code = '57014');
            IF slow > tbl_repl._slow_rows() THEN
                -- it is not the rows, and each try costs all others the time
                rejected[1].key := NULL;
                rejected[1].message := format('more than %s rows take too long, each by itself', tbl_repl._slow_rows());
            END IF;
            IF cardinality(rejected) > 0 AND rejected[1].key IS NULL THEN
                -- the definition is at fault: a person is needed, the queue is kept
                broken := array_append(broken, item.target_id);
                IF rejected[1].code = stubborn THEN
                    PERFORM tbl_repl._log_error(item.target_id, NULL, stubborn, rejected[1].message, 'Not the first row nor the last one gets through.',
                                                'Its changes stay queued, and are tried again by the next replay.', NULL);
                ELSE
                    PERFORM tbl_repl._target_failed(item.target_id, rejected[1].code, rejected[1].message);
                END IF;
                poison := ARRAY(SELECT p FROM unnest(poison) AS p WHERE p.target_id <> item.target_id);
                keys := NULL;
                EXIT;
            END IF;
            IF item.turn = turns THEN
                poison := poison || ARRAY(SELECT ROW(r.target_id, r.key, r.absent, r.code, r.message, item.origin)::tbl_repl.poison FROM unnest(rejected) AS r);
                counted := counted + least(size, cardinality(keys)) - cardinality(rejected);
            END IF;
            keys := keys[size + 1:];
            IF clock_timestamp() - began < timeout / 5 THEN
                size := least(size * 2, tbl_repl._rows_per_message());
            END IF;
        END LOOP;
        CLOSE portal;
        shipped := shipped + counted;
        by_target := tbl_repl._add_count(by_target, item.target_id, counted);
    END LOOP;
    -- What failed because of another row (a parent not there yet, a value not yet given up) may do now.
    LOOP
        progress := false;
        left_bad := ARRAY(SELECT p FROM unnest(poison) AS p WHERE NOT tbl_repl._is_about_other_rows(p.code));
        FOR item IN
            SELECT p.target_id, p.absent, p.origin, array_agg(p.key) AS keys
            FROM unnest(poison) AS p JOIN tbl_repl.target AS t ON t.target_id = p.target_id JOIN tbl_repl.source AS s USING (source_id)
            WHERE tbl_repl._is_about_other_rows(p.code)
            GROUP BY p.target_id, p.absent, p.origin, s.fk_rank ORDER BY s.fk_rank, p.target_id
        LOOP
            IF carried THEN
                PERFORM tbl_repl._call(conn, tbl_repl._set_origin(coalesce(item.origin, tbl_repl.node_name())), clock_timestamp() + timeout);
            END IF;
            rejected := tbl_repl._apply_keys(conn, timeout, item.target_id, item.absent, item.keys, false, stubborn);
            counted := cardinality(item.keys) - cardinality(rejected);
            progress := progress OR counted > 0;
            shipped := shipped + counted;
            by_target := tbl_repl._add_count(by_target, item.target_id, counted);
            left_bad := left_bad || ARRAY(SELECT ROW(r.target_id, r.key, r.absent, r.code, r.message, item.origin)::tbl_repl.poison FROM unnest(rejected) AS r);
        END LOOP;
        poison := left_bad;
        EXIT WHEN NOT progress;
    END LOOP;
    IF carried THEN
        PERFORM tbl_repl._call(conn, tbl_repl._set_origin(tbl_repl.node_name()), clock_timestamp() + timeout);
    END IF;
    -- what rows referred to that have changed since
    cleared := tbl_repl._clear_kept(conn, timeout, ARRAY(SELECT k FROM unnest(kept) AS k WHERE k <> ALL (broken)), by_target);
    shipped := shipped + cleared.deleted;
    by_target := cleared.by_target;
    poison := poison || cleared.left_there;
    PERFORM tbl_repl._commit(conn, timeout);
    PERFORM tbl_repl._release(ARRAY(SELECT l FROM unnest(loads) AS l WHERE l.target_id <> ALL (broken)), poison);
END
$function$;
COMMENT ON FUNCTION tbl_repl._apply_by_halves(text, interval, tbl_repl.load[], text) IS
    'ships keys, halving where the target rejects some, until the rows that are to blame are found';

-- _apply_keys: the keys that the target rejects.  A single one without key: the definition is at fault, or (57014) so
-- many rows take too long.
CREATE OR REPLACE FUNCTION tbl_repl._apply_keys(
    conn      text,
    timeout   interval,
    target_id integer,
    absent    boolean,
    keys      text[],
    outermost boolean,
    stubborn  text
)
RETURNS tbl_repl.poison[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    cascades boolean := tbl_repl._cascades(ARRAY[target_id]);
    guard    text := (SELECT string_agg(format(' AND NOT EXISTS (SELECT FROM %s AS r WHERE %s)', a.dst_table, a.match), '')
                      FROM tbl_repl._taken_along(target_id) AS a);
    awaited  text := 'rows on the target refer to it, whose new state has not arrived there';
    left_there bigint;
    gone     text[];
    head     text := (SELECT format('DELETE FROM %s AS d', tbl_repl._dst_table(t)) FROM tbl_repl.target AS t WHERE t.target_id = _apply_keys.target_id);
    form     text;
    rendered record;
    asides   text;
    deletes  text;
    bad      tbl_repl.poison;
    half     integer := cardinality(keys) / 2;
    ends     tbl_repl.poison[];
    sent     boolean;
    context  text;
BEGIN
    FOREACH form IN ARRAY '{plain,aside}'::text[] LOOP
        sent := false;
        BEGIN
            EXECUTE format('SELECT * FROM tbl_repl.render_%s($1, false, $2, $3)', target_id) INTO rendered USING keys, absent, form;
            IF form = 'plain' THEN
                deletes := rendered.deletes;
            ELSE
                asides := rendered.deletes;
            END IF;
            IF deletes IS NULL AND rendered.upserts IS NULL THEN
                RETURN '{}';
            END IF;
            -- by itself: a message that the target cannot even read (22P05) makes no savepoint
            PERFORM tbl_repl._call(conn, 'SAVEPOINT tbl_repl', clock_timestamp() + timeout);
            sent := true;
            PERFORM tbl_repl._send(conn, concat_ws('; ', 'SET CONSTRAINTS ALL DEFERRED', asides,
                                                   CASE WHEN NOT cascades THEN deletes END, rendered.upserts, CASE WHEN cascades THEN deletes || coalesce(guard, '') END,
                                                   'SET CONSTRAINTS ALL IMMEDIATE'));
            -- each of the three that may take long is bounded there
            PERFORM tbl_repl._receive(conn, clock_timestamp() + timeout * 3, false, true);
            gone := '{}';
            IF guard IS NOT NULL AND deletes IS NOT NULL THEN
                left_there := tbl_repl._call(conn, format('SELECT pg_catalog.count(*) FROM %s%s', substr(head, length('DELETE FROM ') + 1),
                                                          regexp_replace(substr(deletes, length(head) + 1), '^ USING', ',')), clock_timestamp() + timeout);
                IF left_there > 0 THEN
                    gone := tbl_repl._without_row(target_id, keys);
                    IF left_there <> cardinality(gone) THEN
                        -- which of them is found out by halving
                        RAISE EXCEPTION USING ERRCODE = 'foreign_key_violation', MESSAGE = awaited;
                    END IF;
                END IF;
            END IF;
            PERFORM tbl_repl._call(conn, 'RELEASE tbl_repl', clock_timestamp() + timeout);
            RETURN ARRAY(SELECT ROW(_apply_keys.target_id, g, _apply_keys.absent, '23503', awaited, NULL)::tbl_repl.poison FROM unnest(gone) AS g);
        EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
            GET STACKED DIAGNOSTICS context = PG_EXCEPTION_CONTEXT;
            IF tbl_repl._is_transient(SQLSTATE) AND NOT (tbl_repl._is_too_slow(SQLSTATE, context, conn)
                                                           OR SQLSTATE IS NOT DISTINCT FROM stubborn) THEN
                RAISE;
            END IF;
            bad := ROW(_apply_keys.target_id, keys[1], _apply_keys.absent, SQLSTATE, SQLERRM, NULL)::tbl_repl.poison;
        END;
        IF sent THEN
            PERFORM tbl_repl._call(conn, 'ROLLBACK TO tbl_repl; RELEASE tbl_repl', clock_timestamp() + timeout);
        END IF;
        EXIT WHEN bad.code NOT IN ('23505', '23P01');
    END LOOP;
    -- what has been told apart from other rows before is the row's own fault (42501: a policy of the target)
    IF outermost AND (tbl_repl._is_definition_error(bad.code) OR bad.code IS NOT DISTINCT FROM stubborn)
       AND NOT EXISTS (SELECT FROM tbl_repl.quarantined AS q
                       WHERE q.target_id = _apply_keys.target_id AND q.key = ALL (keys) AND q.sqlstate = bad.code) THEN
        IF cardinality(keys) = 1 THEN
            ends := ARRAY[bad, bad];
        ELSE
            ends := tbl_repl._apply_keys(conn, timeout, target_id, absent, keys[1:1], false, stubborn)
                 || tbl_repl._apply_keys(conn, timeout, target_id, absent, keys[cardinality(keys):], false, stubborn);
        END IF;
        IF cardinality(ends) = 2 AND ends[1].code = bad.code AND ends[2].code = bad.code THEN
            bad.key := NULL;
            RETURN ARRAY[bad];
        END IF;
    END IF;
    IF cardinality(keys) = 1 THEN
        RETURN ARRAY[bad];
    ELSIF outermost AND bad.code = '57014' THEN
        bad.key := NULL;
        RETURN ARRAY[bad];
    END IF;
    RETURN tbl_repl._apply_keys(conn, timeout, target_id, absent, keys[:half], false, stubborn)
        || tbl_repl._apply_keys(conn, timeout, target_id, absent, keys[half + 1:], false, stubborn);
END
$function$;
COMMENT ON FUNCTION tbl_repl._apply_keys(text, interval, integer, boolean, text[], boolean, text) IS
    'ships some keys inside a remote transaction; returns those that the target rejects';

CREATE OR REPLACE FUNCTION tbl_repl._slow_rows() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 5;
COMMENT ON FUNCTION tbl_repl._slow_rows() IS
    'how many rows of a batch may be too slow, each by itself, before the target is taken for failed';

-- Says nothing about the rows: the target is out of reach, busy, full, read-only, shutting down.
CREATE OR REPLACE FUNCTION tbl_repl._is_transient(code text)
RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT code ~ '^(08|25|28|40|53|55|57|58|XX)' OR code IN ('3D000', '42704')
$function$;
COMMENT ON FUNCTION tbl_repl._is_transient(text) IS
    'whether an error says something about the target rather than about a row; 42704 is a missing mapping';

-- A statement that the target has cancelled (its statement_timeout), not one that was cancelled here: only what dblink
-- raises names the connection in its context, in every language.
CREATE OR REPLACE FUNCTION tbl_repl._is_too_slow(code text, context text, conn text)
RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT code = '57014' AND strpos(context, conn) > 0
$function$;
COMMENT ON FUNCTION tbl_repl._is_too_slow(text, text, text) IS
    'whether an error says that a statement took too long on the target: with fewer rows it may not';

-- Any trigger of the target may raise anything.  So what three tries in a row have met may be said of a row after all; then
-- it is looked for, and found if others get through.  Not what passes by itself, as locks do: a search would wait for each.
CREATE OR REPLACE FUNCTION tbl_repl._is_stubborn(loads tbl_repl.load[], code text)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT code !~ '^(08|40|53|57)' AND code NOT IN ('25006', '55P03') AND EXISTS (
        SELECT FROM unnest(loads) AS l
        CROSS JOIN LATERAL (
            SELECT e.sqlstate FROM tbl_repl.error AS e
            WHERE e.target_id = l.target_id AND e.at > coalesce(tbl_repl._shipped_at(l.target_id), '-infinity')
            ORDER BY e.at DESC LIMIT 3) AS e
        GROUP BY l.target_id HAVING count(*) = 3 AND bool_and(e.sqlstate = code))
$function$;
COMMENT ON FUNCTION tbl_repl._is_stubborn(tbl_repl.load[], text) IS
    'whether an error that seemed to be the target''s has come so often that it may be a row''s';

-- A definition that no longer fits: no row can help it.
CREATE OR REPLACE FUNCTION tbl_repl._is_definition_error(code text)
RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT code IN ('42P01', '42703', '42501', '3F000', '42P10', '42883', '42804', '428C9')
$function$;
COMMENT ON FUNCTION tbl_repl._is_definition_error(text) IS
    'whether an error says that the target''s definition does not fit its table';

-- What is in quarantine, as something to ship.  Together, for rows may be in each other's way (but as changes of the node that made
-- them, see _takes_origin); those that take too long one by one, and in turn.
CREATE OR REPLACE FUNCTION tbl_repl._quarantine_loads(targets integer[], max_rows integer)
RETURNS tbl_repl.load[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $function$
    SELECT coalesce(array_agg(ROW(q.target_id, s.fk_rank, format(
               'SELECT array_agg(q.key) AS keys FROM (SELECT key FROM tbl_repl.quarantined WHERE target_id = %s AND (sqlstate = ''57014'') = %L '
               'AND origin IS NOT DISTINCT FROM %L ORDER BY last_failed_at LIMIT %s) AS q HAVING count(*) > 0',
               q.target_id, q.slow, o.origin, CASE WHEN q.slow THEN 1 ELSE greatest(max_rows, tbl_repl._rows_per_message()) END),
               true, false, o.origin)::tbl_repl.load), '{}')
    FROM (SELECT DISTINCT ON (x.target_id) x.target_id, x.sqlstate = '57014' AS slow
          FROM tbl_repl.quarantined AS x WHERE x.target_id = ANY (targets) ORDER BY x.target_id, x.last_failed_at) AS q
    CROSS JOIN LATERAL (SELECT DISTINCT x.origin FROM tbl_repl.quarantined AS x
                        WHERE x.target_id = q.target_id AND (x.sqlstate = '57014') = q.slow) AS o
    JOIN tbl_repl.target AS t USING (target_id) JOIN tbl_repl.source AS s USING (source_id)
$function$;
COMMENT ON FUNCTION tbl_repl._quarantine_loads(integer[], integer) IS 'another try of what targets have rejected';

-- Quarantine after a batch: what was rejected goes in, what was shipped comes out.
CREATE OR REPLACE FUNCTION tbl_repl._release(loads tbl_repl.load[], poison tbl_repl.poison[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    item record;
BEGIN
    FOR item IN SELECT l.target_id, l.chunks FROM unnest(loads) AS l
                WHERE EXISTS (SELECT FROM tbl_repl.quarantined AS q WHERE q.target_id = l.target_id)
    LOOP
        EXECUTE format('DELETE FROM tbl_repl.quarantined AS q WHERE q.target_id = %s AND q.key IN (SELECT unnest(x.keys) FROM (%s) AS x) AND q.key <> ALL ($1)',
                       item.target_id, item.chunks)
        USING ARRAY(SELECT p.key FROM unnest(poison) AS p WHERE p.target_id = item.target_id);
    END LOOP;
    -- What has never arrived is not expected there: expected stays as it was before the first failure, unless a person
    -- has said that it does not matter (NULL).
    INSERT INTO tbl_repl.quarantined AS q (target_id, key, sqlstate, message, origin, expected)
    SELECT DISTINCT ON (p.target_id, p.key) p.target_id, p.key, p.code, p.message, p.origin, x.digests
    FROM unnest(poison) AS p
    LEFT JOIN (SELECT t.target_id, e.key, e.digests
               FROM tbl_repl.target AS t
               CROSS JOIN LATERAL tbl_repl._expected(t.target_id, ARRAY(SELECT u.key FROM unnest(poison) AS u WHERE u.target_id = t.target_id)) AS e
               WHERE t.on_conflict IN ('keep', 'error') AND t.target_id IN (SELECT u.target_id FROM unnest(poison) AS u)) AS x USING (target_id, key)
    ON CONFLICT (target_id, key) DO UPDATE
    SET attempts = q.attempts + 1, sqlstate = excluded.sqlstate, message = excluded.message, origin = excluded.origin, last_failed_at = clock_timestamp(),
        expected = CASE WHEN excluded.expected IS NOT NULL THEN q.expected END;
    PERFORM tbl_repl._log_error(p.target_id, p.key, p.code, p.message, NULL,
                                'The row is in quarantine; it is tried again when it changes, or by replay.', NULL)
    FROM (SELECT DISTINCT ON (u.target_id, u.key) u.* FROM unnest(poison) AS u LIMIT 100) AS p;
END
$function$;
COMMENT ON FUNCTION tbl_repl._release(tbl_repl.load[], tbl_repl.poison[]) IS
    'brings the quarantine up to date after a batch';
