# ruby-pg
require 'pg'
require_relative 'said'

INSERT = "INSERT INTO written VALUES ($1, $2, 'x')".freeze

threads(2) do |worker|
  db = PG.connect
  insert = -> { db.exec_params(INSERT, [Worker::RUN, worker.id]) }
  ops = {
    auto: insert,
    transaction: lambda {
      db.transaction do
        insert.call
        db.exec('SAVEPOINT s')
        insert.call
        db.exec('RELEASE s')
      end
    },
    prepared: lambda {
      db.prepare('mine', INSERT)
      begin
        2.times do
          db.exec_prepared('mine', [Worker::RUN, worker.id])
          sleep 0.003
        end
      ensure
        db.exec('DEALLOCATE mine')
      end
    },
    deallocated_in_transaction: lambda {
      db.transaction do
        db.prepare('other', INSERT)
        db.exec_prepared('other', [Worker::RUN, worker.id])
        db.exec('DEALLOCATE other')
      end
    },
    read: -> { right(db.exec_params('SELECT $1::int + 1', [4]).getvalue(0, 0), '5') },
    copy_in: lambda {
      db.copy_data('COPY written (run, id) FROM STDIN') do
        db.put_copy_data("#{Worker::RUN}\t#{worker.id}\n")
        sleep 0.02
        db.put_copy_data("#{Worker::RUN}\t#{worker.id}\n")
      end
    },
    copy_out: lambda {
      seen = 0
      db.copy_data('COPY (SELECT generate_series(1, 500)) TO STDOUT') { seen += 1 while db.get_copy_data }
      right(seen, 500)
    },
    single_rows: lambda {
      db.send_query('SELECT generate_series(1, 30)')
      db.set_single_row_mode
      seen = 0
      while (result = db.get_result)
        seen += result.check.ntuples
      end
      right(seen, 30)
    },
    hold: lambda {
      db.exec('DECLARE h CURSOR WITH HOLD FOR SELECT generate_series(1, 30)')
      begin
        right(db.exec('FETCH 30 FROM h').ntuples, 30)
      ensure
        db.exec('CLOSE h')
      end
    }
  }
  after = lambda {
    db.reset if db.status != PG::CONNECTION_OK
    db.exec('ROLLBACK') unless db.transaction_status.zero?
  }
  worker.work(ops, after)
end
