// postgres.js: prepared | unprepared
const { run, right, workers, modules } = require('./said.js');
const postgres = require(modules + 'postgres');
const sql = postgres({ max: 4, prepare: process.argv[2] !== 'unprepared', onnotice: () => {} });

workers(2, (worker) => ({
  auto: () => sql`INSERT INTO written VALUES (${run}, ${worker.id()}, 'x')`,
  transaction: () => sql.begin(async (tx) => {
    await tx`INSERT INTO written VALUES (${run}, ${worker.id()}, 'x')`;
    await tx.savepoint((inner) => inner`INSERT INTO written VALUES (${run}, ${worker.id()}, 'x')`);
  }),
  read: async () => {
    for (let wanted = 0; wanted < 3; wanted++) {
      right([...await sql`SELECT ${wanted}::int + 1 AS x`], [{ x: wanted + 1 }]);
    }
  },
  pipelined: () => sql.begin((tx) => [1, 2, 3].map(
    () => tx`INSERT INTO written VALUES (${run}, ${worker.id()}, 'x')`)),
  many: () => sql`INSERT INTO written ${sql([1, 2, 3].map(() => ({ run, id: worker.id() })))}`,
  cursor: () => sql.begin(async (tx) => {
    let seen = 0;
    await tx`SELECT generate_series(1, 30) AS x`.cursor(10, (rows) => { seen += rows.length; });
    right(seen, 30);
  }),
  copy_in: async () => {
    const stream = await sql`COPY written (run, id) FROM STDIN`.writable();
    const done = new Promise((ok, no) => stream.on('finish', ok).on('error', no));
    stream.end(`${run}\t${worker.id()}\n${run}\t${worker.id()}\n`);
    await done;
  },
  copy_out: async () => {
    const stream = await sql`COPY (SELECT generate_series(1, 500)) TO STDOUT`.readable();
    let seen = '';
    for await (const part of stream) seen += part;
    right(seen.split('\n').length, 501);
  },
  simple: () => sql.unsafe(`INSERT INTO written VALUES (${run}, ${worker.id()}); SELECT 1`).simple(),
})).then(() => sql.end({ timeout: 5 }));
