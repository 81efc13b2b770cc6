SELECT set_config('work_mem', (1000 + :client_id)::text || 'kB', false) AS w, set_config('my.client', :client_id::text, false) AS c \gset
SELECT current_setting('my.client')::int AS mine, (SELECT setting::int FROM pg_settings WHERE name = 'work_mem') AS memory \gset
\if :mine != :client_id or :memory != 1000 + :client_id
  SELECT 'WRONG ANSWER: not my settings'::int;
\endif
INSERT INTO said (client, what) VALUES (:client_id, 'x') RETURNING client AS who \gset
\if :who != :client_id
  SELECT 'WRONG ANSWER: not my row'::int;
\endif
