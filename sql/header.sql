\echo Use "CREATE EXTENSION tbl_repl CASCADE" to load this file. \quit

-- Functions call each other across files; bodies are checked when they run, and by the tests.
SET LOCAL check_function_bodies = off;
