// node-postgres with its pool; "named" prepares every query.
const { run, sleep, right, workers, modules } = require('./said.js');
const { Pool } = require(modules + 'pg');
const Cursor = require(modules + 'pg-cursor');
const copy = require(modules + 'pg-copy-streams');
const named = process.argv[2] === 'named';
const pool = new Pool({ max: 4 });
pool.on('error', () => {});
const query = (text, values) => named ? { name: text, text, values } : { text, values };
const insert = 'INSERT INTO written VALUES ($1, $2, $3)';

async function lent(work) {
  const client = await pool.connect();
  let broken;
  try {
    await client.query('BEGIN');
    await work(client);
    await client.query('COMMIT');
  } catch (error) {
    await client.query('ROLLBACK').catch((it) => { broken = it; });
    throw error;
  } finally {
    client.release(broken);
  }
}

workers(2, (worker) => ({
  auto: () => pool.query(query(insert, [run, worker.id(), 'x'])),
  transaction: () => lent(async (client) => {
    await client.query(query(insert, [run, worker.id(), 'x']));
    await client.query('SAVEPOINT s');
    await client.query(query(insert, [run, worker.id(), 'x']));
    await client.query('RELEASE s');
  }),
  read: async () => {
    for (let wanted = 0; wanted < 3; wanted++) {
      const { rows } = await pool.query(query('SELECT $1::int + 1 AS x', [wanted]));
      right(rows, [{ x: wanted + 1 }]);
    }
  },
  queued: () => lent(async (client) => {
    await Promise.all([1, 2, 3].map(() => client.query(query(insert, [run, worker.id(), 'x']))));
  }),
  cursor: () => lent(async (client) => {
    const cursor = client.query(new Cursor('SELECT generate_series(1, 30) AS x'));
    for (let part = 0; part < 3; part++) {
      right((await cursor.read(10)).length, 10);
      await sleep(3);
    }
    await cursor.close();
  }),
  copy_in: () => lent(async (client) => {
    const stream = client.query(copy.from('COPY written (run, id) FROM STDIN'));
    const done = new Promise((ok, no) => stream.on('finish', ok).on('error', no));
    stream.write(`${run}\t${worker.id()}\n`);
    await sleep(20);
    stream.end(`${run}\t${worker.id()}\n`);
    await done;
  }),
  copy_out: () => lent(async (client) => {
    const stream = client.query(copy.to('COPY (SELECT generate_series(1, 500)) TO STDOUT'));
    let seen = '';
    for await (const part of stream) seen += part;
    right(seen.split('\n').length, 501);
  }),
  script: () => pool.query(`INSERT INTO written VALUES (${run}, ${worker.id()}); SELECT 1`),
})).then(() => pool.end());
