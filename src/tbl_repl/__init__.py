"""Tools for the PostgreSQL extension tbl_repl: installer, demo, disposable servers."""
