// Package said is what each program of tests/clients says: one line for each unit of work
// (tests/src/clients.rs).
package said

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Run is the number of this run, a column of its rows.
var Run = number("RUN")

func number(name string) int {
	n, err := strconv.Atoi(os.Getenv(name))
	if err != nil {
		panic(err)
	}
	return n
}

// Worker gives out ids.
type Worker struct {
	Number, count int
	ids           []string
}

// ID is a new one.
func (w *Worker) ID() int64 {
	w.count++
	id := int64(w.Number*1_000_000 + w.count)
	w.ids = append(w.ids, strconv.FormatInt(id, 10))
	return id
}

// Wrong is an answer that is not the right one.
type Wrong struct{ what string }

func (w Wrong) Error() string { return w.what }

// Right compares.
func Right(seen, wanted any) error {
	if seen != wanted {
		return Wrong{fmt.Sprintf("%v instead of %v", seen, wanted)}
	}
	return nil
}

// Op is one unit of work.
type Op struct {
	Name string
	Do   func() error
}

// Workers runs what body gives, until it is told to stop.
func Workers(count int, state func(error) string, body func(*Worker) []Op) {
	var all sync.WaitGroup
	var line sync.Mutex
	for n := 0; n < count; n++ {
		all.Add(1)
		go func(w *Worker) {
			defer all.Done()
			ops := body(w)
			for {
				for _, op := range ops {
					if _, err := os.Stat(os.Getenv("STOP")); err == nil {
						return
					}
					w.ids = nil
					err := op.Do()
					ids := "-"
					if len(w.ids) > 0 {
						ids = strings.Join(w.ids, ",")
					}
					told := "ok " + ids
					if wrong, is := err.(Wrong); is {
						told = "wrong " + wrong.what
					} else if err != nil {
						told = fmt.Sprintf("error %s %s %s", state(err), ids, strings.ReplaceAll(err.Error(), "\n", " "))
					}
					line.Lock()
					fmt.Printf("%d %s %s\n", w.Number, op.Name, told)
					line.Unlock()
					time.Sleep(5 * time.Millisecond)
				}
			}
		}(&Worker{Number: number("WORKER") + n})
	}
	all.Wait()
}
