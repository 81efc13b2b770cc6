<?php
// The functions of the pgsql extension: plain | persistent (pg_pconnect)
require __DIR__ . '/said.php';
$worker = new Worker();
$connect = fn () => ($argv[1] === 'persistent' ? 'pg_pconnect' : 'pg_connect')('');
$db = $connect();

final class Failed extends Exception
{
    public string $state = '-';
}

$check = function ($result, $wanted = PGSQL_COMMAND_OK) use (&$db) {
    $is = $result ? pg_result_status($result) : -1;
    if ($is !== $wanted) {
        $error = new Failed($result ? pg_result_error($result) : pg_last_error($db));
        $error->state = ($result ? pg_result_error_field($result, PGSQL_DIAG_SQLSTATE) : null) ?: '-';
        throw $error;
    }
    return $result;
};
// These report SQLSTATEs, which pg_query() does not.
$query = function (string $sql, int $wanted = PGSQL_COMMAND_OK) use (&$db, $check) {
    pg_send_query($db, $sql) or throw new Failed(pg_last_error($db));
    $last = null;
    while ($result = pg_get_result($db)) {
        $last = $result;
        if (pg_result_status($result) === PGSQL_FATAL_ERROR) {
            $check($result);
        }
        if (pg_result_status($result) === PGSQL_COPY_IN) {
            break;
        }
    }
    return $check($last, $wanted);
};
$params = function (string $sql, array $values, int $wanted = PGSQL_COMMAND_OK) use (&$db, $check) {
    pg_send_query_params($db, $sql, $values) or throw new Failed(pg_last_error($db));
    $result = pg_get_result($db);
    while (pg_get_result($db)) {
    }
    return $check($result, $wanted);
};
$insert = fn () => $params("INSERT INTO written VALUES ($1, $2, 'x')", [$worker->run, $worker->id()]);
$ops = [
    'auto' => $insert,
    'transaction' => function () use ($query, $insert) {
        $query('BEGIN');
        $insert();
        $query('SAVEPOINT s');
        $insert();
        $query('COMMIT');
    },
    'prepared' => function () use (&$db, $check, $query, $worker) {
        $drain = function () use (&$db, $check) {
            $result = pg_get_result($db);
            while (pg_get_result($db)) {
            }
            $check($result);
        };
        pg_send_prepare($db, 'mine', "INSERT INTO written VALUES ($1, $2, 'x')");
        $drain();
        try {
            for ($n = 0; $n < 2; $n++) {
                pg_send_execute($db, 'mine', [$worker->run, $worker->id()]);
                $drain();
            }
        } finally {
            $query('DEALLOCATE mine');
        }
    },
    'read' => fn () => right(pg_fetch_result($params('SELECT $1::int + 1', [4], PGSQL_TUPLES_OK), 0, 0), '5'),
    'cursor' => function () use ($query) {
        $query('BEGIN');
        $query('DECLARE c CURSOR FOR SELECT generate_series(1, 30)');
        right(pg_num_rows($query('FETCH 10 FROM c', PGSQL_TUPLES_OK)), 10);
        usleep(5000);
        right(pg_num_rows($query('FETCH 30 FROM c', PGSQL_TUPLES_OK)), 20);
        $query('COMMIT');
    },
    'hold' => function () use ($query) {
        $query('DECLARE h CURSOR WITH HOLD FOR SELECT generate_series(1, 30)');
        right(pg_num_rows($query('FETCH 30 FROM h', PGSQL_TUPLES_OK)), 30);
        $query('CLOSE h');
    },
    'copy_in' => function () use (&$db, $query, $worker) {
        $query('COPY written (run, id) FROM STDIN', PGSQL_COPY_IN);
        pg_put_line($db, "$worker->run\t{$worker->id()}\n");
        usleep(20000);
        pg_put_line($db, "$worker->run\t{$worker->id()}\n");
        pg_end_copy($db) or throw new Failed(pg_last_error($db));
    },
    'copy_out' => fn () => right(count(pg_copy_to($db, '(SELECT generate_series(1, 500))')), 500),
];
$worker->work($ops, fn ($error) => $error->state ?? '-', function () use (&$db, $query, $connect) {
    // A FATAL shows in the status only when the connection is used again.
    if (!@pg_query($db, '') && pg_connection_status($db) !== PGSQL_CONNECTION_OK) {
        pg_connection_reset($db) or $db = $connect();
        throw new Failed('the connection was lost');
    }
    if (pg_transaction_status($db) !== PGSQL_TRANSACTION_IDLE) {
        $query('ROLLBACK');
    }
});
