// lib/pq in database/sql; the argument is added to its connection string.
package main

import (
	"database/sql"
	"errors"
	"os"
	"time"

	"said"

	"github.com/lib/pq"
)

const insert = "INSERT INTO written VALUES ($1, $2, 'x')"

func state(err error) string {
	var it *pq.Error
	if errors.As(err, &it) {
		return string(it.Code)
	}
	return "-"
}

func main() {
	db, err := sql.Open("postgres", "sslmode=disable "+os.Args[1])
	if err != nil {
		panic(err)
	}
	db.SetMaxOpenConns(4)
	said.Workers(2, state, func(w *said.Worker) []said.Op {
		within := func(work func(tx *sql.Tx) error) func() error {
			return func() error {
				tx, err := db.Begin()
				if err != nil {
					return err
				}
				if err := work(tx); err != nil {
					tx.Rollback()
					return err
				}
				return tx.Commit()
			}
		}
		return []said.Op{
			{"auto", func() error { _, err := db.Exec(insert, said.Run, w.ID()); return err }},
			{"transaction", within(func(tx *sql.Tx) error {
				if _, err := tx.Exec(insert, said.Run, w.ID()); err != nil {
					return err
				}
				_, err := tx.Exec(insert, said.Run, w.ID())
				return err
			})},
			{"read", func() error {
				for wanted := 0; wanted < 3; wanted++ {
					var seen int
					if err := db.QueryRow("SELECT $1::int + 1", wanted).Scan(&seen); err != nil {
						return err
					}
					if err := said.Right(seen, wanted+1); err != nil {
						return err
					}
				}
				return nil
			}},
			{"prepared", func() error {
				statement, err := db.Prepare(insert)
				if err != nil {
					return err
				}
				defer statement.Close()
				for n := 0; n < 2; n++ {
					if _, err := statement.Exec(said.Run, w.ID()); err != nil {
						return err
					}
					time.Sleep(3 * time.Millisecond)
				}
				return nil
			}},
			{"rows", func() error {
				rows, err := db.Query("SELECT generate_series(1, 300)")
				if err != nil {
					return err
				}
				defer rows.Close()
				seen := 0
				for rows.Next() {
					seen++
				}
				if err := rows.Err(); err != nil {
					return err
				}
				return said.Right(seen, 300)
			}},
			{"copy_in", within(func(tx *sql.Tx) error {
				copy, err := tx.Prepare(pq.CopyIn("written", "run", "id"))
				if err != nil {
					return err
				}
				for n := 0; n < 2; n++ {
					if _, err := copy.Exec(said.Run, w.ID()); err != nil {
						return err
					}
					time.Sleep(10 * time.Millisecond)
				}
				if _, err := copy.Exec(); err != nil {
					return err
				}
				return copy.Close()
			})},
			{"cursor", within(func(tx *sql.Tx) error {
				if _, err := tx.Exec("DECLARE c CURSOR FOR SELECT generate_series(1, 30)"); err != nil {
					return err
				}
				result, err := tx.Exec("FETCH 30 FROM c")
				if err != nil {
					return err
				}
				seen, err := result.RowsAffected()
				if err != nil {
					return err
				}
				return said.Right(seen, int64(30))
			})},
		}
	})
	db.Close()
}
