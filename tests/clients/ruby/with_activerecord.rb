# ActiveRecord: prepared (three statements at most, so that it evicts) | unprepared
require 'active_record'
require_relative 'said'

ActiveRecord::Base.establish_connection(
  adapter: 'postgresql', host: ENV.fetch('PGHOST'), port: ENV.fetch('PGPORT'), username: ENV.fetch('PGUSER'),
  password: ENV.fetch('PGPASSWORD'), database: ENV.fetch('PGDATABASE'), pool: 3,
  prepared_statements: ARGV[0] == 'prepared', statement_limit: 3
)

class Written < ActiveRecord::Base
  self.table_name = 'written'
  self.primary_key = 'id'
end

Written.columns

threads(2) do |worker|
  create = -> { Written.create!(run: Worker::RUN, id: worker.id, note: 'x') }
  ops = {
    create: create,
    transaction: lambda {
      Written.transaction do
        create.call
        Written.transaction(requires_new: true) { create.call }
      end
    },
    create_many: -> { Written.create!([{ run: Worker::RUN, id: worker.id }, { run: Worker::RUN, id: worker.id }]) },
    update: lambda {
      id = worker.id
      row = Written.create!(run: Worker::RUN, id: id, note: 'x')
      row.update!(note: 'y')
      right(Written.find_by(id: id, run: Worker::RUN).note, 'y')
    },
    reads: lambda {
      Written.transaction do
        6.times { |n| Written.where(run: Worker::RUN).where('id > ?', 0).limit(n + 1).offset(n).to_a }
        [%w[run], %w[id], %w[note], %w[run id]].each { |it| Written.where(run: Worker::RUN).select(it).first }
        create.call
      end
    }
  }
  worker.work(ops, -> {})
end
