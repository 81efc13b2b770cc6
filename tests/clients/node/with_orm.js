// knex | sequelize | drizzle | kysely | typeorm, all over node-postgres.
const { run, right, workers, modules } = require('./said.js');
const login = {
  host: process.env.PGHOST, port: Number(process.env.PGPORT), user: process.env.PGUSER,
  password: process.env.PGPASSWORD, database: process.env.PGDATABASE,
};

const kinds = {
  knex() {
    const knex = require(modules + 'knex')({ client: 'pg', connection: login, pool: { min: 2, max: 4 } });
    const row = (worker) => ({ run, id: worker.id(), note: 'x' });
    return [(worker) => ({
      insert: () => knex('written').insert(row(worker)),
      transaction: () => knex.transaction(async (tx) => {
        await tx('written').insert(row(worker));
        await tx.transaction((inner) => inner('written').insert(row(worker)));
      }),
      many: () => knex('written').insert([row(worker), row(worker)]),
      read: async () => right((await knex.raw('SELECT ?::int + 1 AS x', [4])).rows, [{ x: 5 }]),
    }), () => knex.destroy()];
  },
  sequelize() {
    const { Sequelize, DataTypes } = require(modules + 'sequelize');
    const db = new Sequelize(login.database, login.user, login.password,
      { ...login, dialect: 'postgres', logging: false, pool: { max: 4 } });
    const Written = db.define('written',
      { run: DataTypes.INTEGER, id: { type: DataTypes.BIGINT, primaryKey: true }, note: DataTypes.TEXT },
      { tableName: 'written', timestamps: false });
    const row = (worker) => ({ run, id: worker.id(), note: 'x' });
    return [(worker) => ({
      create: () => Written.create(row(worker)),
      transaction: () => db.transaction(async (transaction) => {
        await Written.create(row(worker), { transaction });
        await Written.create(row(worker), { transaction });
      }),
      bulk: () => Written.bulkCreate([row(worker), row(worker)]),
      bound: async () => right((await db.query('SELECT $1::int + 1 AS x', { bind: [4] }))[0], [{ x: 5 }]),
    }), () => db.close()];
  },
  drizzle() {
    const { drizzle } = require(modules + 'drizzle-orm/node-postgres');
    const { pgTable, integer, bigint, text } = require(modules + 'drizzle-orm/pg-core');
    const { sql } = require(modules + 'drizzle-orm');
    const { Pool } = require(modules + 'pg');
    const pool = new Pool({ ...login, max: 4 });
    pool.on('error', () => {});
    const db = drizzle({ client: pool });
    const written = pgTable('written',
      { run: integer(), id: bigint({ mode: 'number' }), note: text() });
    const row = (worker) => ({ run, id: worker.id(), note: 'x' });
    const prepared = db.select({ x: sql`${sql.placeholder('x')}::int + 1` }).from(sql`(SELECT 1) t`).prepare('p');
    return [(worker) => ({
      insert: () => db.insert(written).values(row(worker)),
      transaction: () => db.transaction(async (tx) => {
        await tx.insert(written).values(row(worker));
        await tx.transaction((inner) => inner.insert(written).values(row(worker)));
      }),
      prepared: async () => right(await prepared.execute({ x: 4 }), [{ x: 5 }]),
    }), () => pool.end()];
  },
  kysely() {
    const { Kysely, PostgresDialect, sql } = require(modules + 'kysely');
    const { Pool } = require(modules + 'pg');
    const pool = new Pool({ ...login, max: 4 });
    pool.on('error', () => {});
    const db = new Kysely({ dialect: new PostgresDialect({ pool, cursor: require(modules + 'pg-cursor') }) });
    const row = (worker) => ({ run, id: worker.id(), note: 'x' });
    return [(worker) => ({
      insert: () => db.insertInto('written').values(row(worker)).execute(),
      transaction: () => db.transaction().execute(async (tx) => {
        await tx.insertInto('written').values(row(worker)).execute();
        await tx.insertInto('written').values(row(worker)).execute();
      }),
      read: async () => right((await sql`SELECT ${4}::int + 1 AS x`.execute(db)).rows, [{ x: 5 }]),
    }), () => db.destroy()];
  },
  typeorm() {
    require(modules + 'reflect-metadata');
    const { DataSource, EntitySchema } = require(modules + 'typeorm');
    const Written = new EntitySchema({ name: 'written', columns: {
      run: { type: Number }, id: { type: 'bigint', primary: true }, note: { type: 'text', nullable: true } } });
    const db = new DataSource({ type: 'postgres', host: login.host, port: login.port, username: login.user,
      password: login.password, database: login.database, entities: [Written], extra: { max: 4 } });
    const row = (worker) => ({ run, id: worker.id(), note: 'x' });
    const ready = db.initialize();
    return [async (worker) => {
      await ready;
      return {
        insert: () => db.getRepository('written').insert(row(worker)),
        transaction: () => db.transaction(async (tx) => {
          await tx.getRepository('written').insert(row(worker));
          await tx.getRepository('written').insert([row(worker), row(worker)]);
        }),
        read: async () => right(await db.query('SELECT $1::int + 1 AS x', [4]), [{ x: 5 }]),
      };
    }, () => db.destroy()];
  },
};

const [body, end] = kinds[process.argv[2]]();
workers(2, body).then(end);
