// pgx's pool: prepare | describe | none (statement_cache_mode, simple protocol) | evict (a cache of two)
package main

import (
	"context"
	"errors"
	"os"
	"time"

	"said"

	"github.com/jackc/pgconn"
	"github.com/jackc/pgx/v4"
	"github.com/jackc/pgx/v4/pgxpool"
)

const insert = "INSERT INTO written VALUES ($1, $2, 'x')"

func state(err error) string {
	var it *pgconn.PgError
	if errors.As(err, &it) {
		return it.Code
	}
	return "-"
}

func main() {
	all := context.Background()
	how := map[string]string{
		"prepare":  "statement_cache_mode=prepare",
		"describe": "statement_cache_mode=describe",
		"none":     "statement_cache_capacity=0",
		"evict":    "statement_cache_capacity=2",
	}[os.Args[1]]
	config, err := pgxpool.ParseConfig("sslmode=disable pool_max_conns=4 " + how)
	if err != nil {
		panic(err)
	}
	config.ConnConfig.PreferSimpleProtocol = os.Args[1] == "none"
	db, err := pgxpool.ConnectConfig(all, config)
	if err != nil {
		panic(err)
	}
	said.Workers(2, state, func(w *said.Worker) []said.Op {
		within := func(work func(tx pgx.Tx) error) func() error {
			return func() error { return db.BeginFunc(all, work) }
		}
		one := func(tx pgx.Tx) error { _, err := tx.Exec(all, insert, said.Run, w.ID()); return err }
		return []said.Op{
			{"auto", func() error { _, err := db.Exec(all, insert, said.Run, w.ID()); return err }},
			{"transaction", within(func(tx pgx.Tx) error {
				if err := one(tx); err != nil {
					return err
				}
				return tx.BeginFunc(all, one)
			})},
			{"evicting", within(func(tx pgx.Tx) error {
				for _, text := range []string{"SELECT 1", "SELECT 2", "SELECT 3", "SELECT 4"} {
					var seen int
					if err := tx.QueryRow(all, text).Scan(&seen); err != nil {
						return err
					}
				}
				return one(tx)
			})},
			{"read", func() error {
				for wanted := int32(0); wanted < 3; wanted++ {
					var seen int32
					if err := db.QueryRow(all, "SELECT $1::int + 1", wanted).Scan(&seen); err != nil {
						return err
					}
					if err := said.Right(seen, wanted+1); err != nil {
						return err
					}
				}
				return nil
			}},
			{"batch", func() error {
				batch := &pgx.Batch{}
				for n := 0; n < 3; n++ {
					batch.Queue(insert, said.Run, w.ID())
				}
				return db.SendBatch(all, batch).Close()
			}},
			{"copy_in", func() error {
				rows := [][]any{{int32(said.Run), w.ID()}, {int32(said.Run), w.ID()}}
				done, err := db.CopyFrom(all, pgx.Identifier{"written"}, []string{"run", "id"}, pgx.CopyFromRows(rows))
				if err != nil {
					return err
				}
				return said.Right(done, int64(2))
			}},
			{"prepared", func() error {
				c, err := db.Acquire(all)
				if err != nil {
					return err
				}
				defer c.Release()
				if _, err := c.Conn().Prepare(all, "mine", insert); err != nil {
					return err
				}
				for n := 0; n < 2; n++ {
					if _, err := c.Exec(all, "mine", said.Run, w.ID()); err != nil {
						return err
					}
					time.Sleep(3 * time.Millisecond)
				}
				return c.Conn().Deallocate(all, "mine")
			}},
		}
	})
	db.Close()
}
