\set before :n
\set a random(1, 1000000)
SELECT :a + 1 AS b, 'x' || :a AS t \gset
\if :b != :a + 1
  SELECT 'WRONG ANSWER: not my sum'::int;
\endif
BEGIN;
UPDATE counters SET n = n + 1 WHERE client = :client_id RETURNING n \gset
\if :n != :before + 1
  SELECT 'WRONG ANSWER: not my counter'::int;
\endif
SELECT set_config('my.tenant', :client_id::text, true) AS set_here \gset
SELECT current_setting('my.tenant')::int AS tenant, pg_backend_pid() AS one \gset
SELECT pg_backend_pid() AS other, count(*) AS mine FROM counters WHERE client = :client_id \gset
END;
\if :tenant != :client_id or :one != :other or :mine != 1
  SELECT 'WRONG ANSWER: not my transaction'::int;
\endif
SELECT coalesce(nullif(current_setting('my.tenant', true), ''), '-1')::int AS left \gset
\if :left != -1
  SELECT 'WRONG ANSWER: a setting of a transaction'::int;
\endif
