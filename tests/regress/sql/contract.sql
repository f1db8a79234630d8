--
-- The public contract as a transcript, on one server that is its own target.
--
CREATE EXTENSION tbl_repl CASCADE;
DO $$
BEGIN
    EXECUTE format(
        'CREATE SERVER loop FOREIGN DATA WRAPPER dblink_fdw OPTIONS (host %L, port %L, dbname %L)',
        split_part(current_setting('unix_socket_directories'), ',', 1),
        current_setting('port'), current_database());
END
$$;
CREATE USER MAPPING FOR CURRENT_USER SERVER loop;
CREATE TABLE item (id integer PRIMARY KEY, name text, price numeric);
CREATE TABLE item_copy (LIKE item INCLUDING ALL);
CREATE TABLE item_cheap (label text, id integer PRIMARY KEY);
INSERT INTO item VALUES (1, 'first', 1.50);
-- a target, with what is there already
SELECT tbl_repl.add_target('item', 'loop', 'public.item_copy', mode => 'sync');
SELECT * FROM item_copy ORDER BY id;
-- every kind of change
INSERT INTO item VALUES (2, 'second', 2.50), (3, 'third', 300);
UPDATE item SET name = 'First' WHERE id = 1;
UPDATE item SET id = 20 WHERE id = 2;
DELETE FROM item WHERE id = 3;
SELECT * FROM item_copy ORDER BY id;
BEGIN;
DELETE FROM item;
ROLLBACK;
SELECT * FROM item_copy ORDER BY id;
-- rows, columns and expressions
SELECT tbl_repl.add_target('item', 'loop', 'public.item_cheap', mode => 'async',
    columns => '{id}', column_map => '{"label": "upper(name)"}', row_filter => 'price < 100');
INSERT INTO item VALUES (4, 'fourth', 4);
SELECT op, key FROM tbl_repl.pending ORDER BY key::text;
INSERT INTO item VALUES (5, 'fifth', 500);
CALL tbl_repl.drain();
SELECT id, label FROM item_cheap ORDER BY id;
TRUNCATE item;
CALL tbl_repl.drain();
SELECT count(*) FROM item_copy;
SELECT count(*) FROM item_cheap;
SELECT target_id, source_table, server, dst_table, mode, status, pending_rows
    FROM tbl_repl.target_status ORDER BY target_id;
SELECT * FROM tbl_repl.compare_target(1);
-- refusals
\set VERBOSITY sqlstate
SELECT tbl_repl.add_target('item', 'nowhere');
SELECT tbl_repl.add_target('item', 'loop', 'public.item_copy');
SELECT tbl_repl.add_target('item', 'loop', 'public.other', mode => 'maybe');
SELECT tbl_repl.add_target('item', 'loop', 'public.other', row_filter => 'colour = 1');
DROP EXTENSION tbl_repl;
\set VERBOSITY default
-- the end: the table is as it was
SELECT tbl_repl.drop_target('item', 'loop', 'public.item_copy');
SELECT tbl_repl.drop_target(2);
SELECT count(*) FROM pg_trigger WHERE tgrelid = 'item'::regclass;
DROP EXTENSION tbl_repl;
DROP TABLE item, item_copy, item_cheap;
