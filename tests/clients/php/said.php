<?php
// What each program of tests/clients says: one line for each unit of work (tests/src/clients.rs).
final class Wrong extends Exception {}

function right($seen, $wanted): void
{
    if ($seen !== $wanted) {
        throw new Wrong(var_export($seen, true) . ' instead of ' . var_export($wanted, true));
    }
}

final class Worker
{
    public int $number;
    public int $run;
    public array $ids = [];
    private int $count = 0;

    public function __construct()
    {
        $this->number = (int) getenv('WORKER');
        $this->run = (int) getenv('RUN');
    }

    public function id(): int
    {
        return $this->ids[] = $this->number * 1000000 + ++$this->count;
    }

    /** @param array<string, callable> $ops */
    public function work(array $ops, callable $state, callable $after): void
    {
        while (true) {
            foreach ($ops as $name => $op) {
                clearstatcache();
                if (file_exists(getenv('STOP'))) {
                    return;
                }
                $this->ids = [];
                try {
                    $op();
                    $told = 'ok ' . (implode(',', $this->ids) ?: '-');
                } catch (Wrong $error) {
                    $told = 'wrong ' . $error->getMessage();
                } catch (Throwable $error) {
                    $told = 'error ' . $state($error) . ' ' . (implode(',', $this->ids) ?: '-') . ' ' . $error->getMessage();
                    try {
                        $after();
                    } catch (Throwable $more) {
                        $told .= ' / then ' . $more->getMessage();
                    }
                }
                echo "$this->number $name ", strtr($told, "\n", ' '), "\n";
                usleep(5000);
            }
        }
    }
}
