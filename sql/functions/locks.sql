-- Locks: the classes of the advisory locks, all of them.  The second part of a key is the target_id, where the comment says
-- nothing else.
--
-- Who needs several takes them in this order, those of one class by rising second part:
--
--   copy, piece   waited for by who copies in pieces, up to its lock_timeout; replay and worker only try for them
--   resolve       only tried for
--   connect       tried for until the deadline, and given back once connected
--   ship          waited for by drainers, by who sets a status and by who drops a target: a shipper in flight ends by its
--                 timeout, a drainer with its batch.  Writers try for it, those of sync targets until their timeout
--   queue         tried for until a deadline, by writers shared, by drainers exclusively
--   sleep, spin, figures, worker   only tried for; they save work, no promise hangs on them
--
-- Locks on tables and rows are the application's and come in its order (LOCK TABLE, then a commit that ships), so a deadlock
-- remains possible: the drainer that loses it tries again.

CREATE OR REPLACE FUNCTION tbl_repl._lock_ship() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607281;
COMMENT ON FUNCTION tbl_repl._lock_ship() IS
    'class of the advisory locks ship: shared by direct shippers, exclusive for the drainer; the second part is the target_id';

CREATE OR REPLACE FUNCTION tbl_repl._lock_queue() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607282;
COMMENT ON FUNCTION tbl_repl._lock_queue() IS
    'class of the advisory locks queue: shared by those who queue for a direct target, exclusive for the way back to ok';

CREATE OR REPLACE FUNCTION tbl_repl._lock_connect() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607283;
COMMENT ON FUNCTION tbl_repl._lock_connect() IS
    'class of the advisory locks connect: held while a session opens a connection';

CREATE OR REPLACE FUNCTION tbl_repl._lock_sleep() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607284;
COMMENT ON FUNCTION tbl_repl._lock_sleep() IS
    'class of the advisory lock sleep: exclusive while the worker sleeps; who writes an async table tries to share it to his commit, and notifies if he cannot';

CREATE OR REPLACE FUNCTION tbl_repl._lock_worker() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607285;
COMMENT ON FUNCTION tbl_repl._lock_worker() IS
    'class of the advisory lock worker: held by the worker that serves this database';

CREATE OR REPLACE FUNCTION tbl_repl._lock_copy() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607286;
COMMENT ON FUNCTION tbl_repl._lock_copy() IS
    'class of the advisory lock copy: held by who copies a target in pieces; the second part is the target_id';

CREATE OR REPLACE FUNCTION tbl_repl._lock_spin() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607287;
COMMENT ON FUNCTION tbl_repl._lock_spin() IS
    'class of the advisory lock spin: held by the one session that waits for an answer without sleeping';

CREATE OR REPLACE FUNCTION tbl_repl._lock_piece() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607288;
COMMENT ON FUNCTION tbl_repl._lock_piece() IS
    'class of the advisory lock piece: shared by every job that copies pieces; the second part is the target_id';

CREATE OR REPLACE FUNCTION tbl_repl._lock_figures() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607289;
COMMENT ON FUNCTION tbl_repl._lock_figures() IS
    'class of the advisory lock figures: held by the one session that sums up what backends have shipped';

CREATE OR REPLACE FUNCTION tbl_repl._lock_resolve() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1952607290;
COMMENT ON FUNCTION tbl_repl._lock_resolve() IS
    'class of the advisory locks resolve: 0 for who names this run of the server, the server''s OID for who settles its receipts';
