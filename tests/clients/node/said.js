// What each program of tests/clients says: one line for each unit of work (tests/src/clients.rs).
const fs = require('fs');
const run = Number(process.env.RUN);
const first = Number(process.env.WORKER);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

class Wrong extends Error {}
function right(seen, wanted) {
  if (JSON.stringify(seen) !== JSON.stringify(wanted)) {
    throw new Wrong(`${JSON.stringify(seen)} instead of ${JSON.stringify(wanted)}`);
  }
}

function stateOf(error) {
  for (let it = error; it; it = it.cause || it.original || it.driverError) {
    if (/^[0-9A-Z]{5}$/.test(it.code || '')) return it.code;
  }
  return '-';
}

// `body(worker)` gives units of work by their names; `worker.id()` a new id.
async function workers(count, body) {
  const stopped = () => fs.existsSync(process.env.STOP);
  async function loop(number) {
    const worker = { number: first + number, count: 0, ids: [] };
    worker.id = () => {
      worker.count += 1;
      worker.ids.push(worker.number * 1000000 + worker.count);
      return worker.ids.at(-1);
    };
    const ops = await body(worker);
    while (!stopped()) {
      for (const [name, op] of Object.entries(ops)) {
        if (stopped()) return;
        worker.ids = [];
        let told;
        try {
          await op();
          told = `ok ${worker.ids.join(',') || '-'}`;
        } catch (error) {
          told = error instanceof Wrong ? `wrong ${error.message}`
            : `error ${stateOf(error)} ${worker.ids.join(',') || '-'} ${error.message}`;
        }
        console.log(`${worker.number} ${name} ${told}`.replace(/\n/g, ' '));
        await sleep(5);
      }
    }
  }
  await Promise.all(Array.from({ length: count }, (_, number) => loop(number)));
}

module.exports = { run, sleep, right, workers, modules: process.env.BUILT + '/node/node_modules/' };
