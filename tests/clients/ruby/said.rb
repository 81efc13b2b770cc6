# What each program of tests/clients says: one line for each unit of work (tests/src/clients.rs).
$stdout.sync = true

class Wrong < StandardError; end

def right(seen, wanted)
  raise Wrong, "#{seen.inspect} instead of #{wanted.inspect}" unless seen == wanted
end

def state_of(error)
  while error
    return error.result.error_field(PG::Result::PG_DIAG_SQLSTATE) || '-' if error.respond_to?(:result) && error.result
    error = error.cause
  end
  '-'
end

class Worker
  RUN = Integer(ENV.fetch('RUN'))
  attr_reader :number

  def initialize(number)
    @number = Integer(ENV.fetch('WORKER')) + number
    @count = 0
    @ids = []
  end

  def id
    @ids << @number * 1_000_000 + (@count += 1)
    @ids.last
  end

  def work(ops, after)
    loop do
      ops.each do |name, op|
        return if File.exist?(ENV.fetch('STOP'))

        @ids = []
        ids = -> { @ids.empty? ? '-' : @ids.join(',') }
        begin
          op.call
          told = "ok #{ids.call}"
        rescue Wrong => e
          told = "wrong #{e.message}"
        rescue StandardError => e
          told = "error #{state_of(e)} #{ids.call} #{e.class}: #{e.message}"
          begin
            after.call
          rescue StandardError => e
            told += " / then #{e.message}"
          end
        end
        $stdout.write("#{@number} #{name} #{told.tr("\n", ' ')}\n")
        sleep 0.005
      end
    end
  end
end

def threads(count)
  count.times.map { |n| Thread.new { yield Worker.new(n) } }.each(&:join)
end
