-- The user that dashboards read with: the views for them, and nothing else. May be run again at any time.
--
--   READER_PASSWORD=… psql --file deploy/postgres/reader.sql postgresql://phoenix:…@HOST/phoenix
\set ON_ERROR_STOP on
\getenv password READER_PASSWORD

SELECT 'CREATE ROLE phoenix_reader' WHERE NOT EXISTS (
  SELECT FROM pg_roles WHERE rolname = 'phoenix_reader'
) \gexec
ALTER ROLE phoenix_reader LOGIN PASSWORD :'password';
-- What somebody types into a panel must not keep the database busy for long.
ALTER ROLE phoenix_reader SET statement_timeout = '30s';
ALTER ROLE phoenix_reader SET default_transaction_read_only = on;

SELECT format('GRANT SELECT ON %I.%I TO phoenix_reader', schemaname, viewname)
FROM pg_views WHERE schemaname = current_schema() AND viewname LIKE 'v\_%' \gexec
