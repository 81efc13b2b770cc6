<?php
// PDO: real | emulated | persistent (real prepares on a persistent connection)
require __DIR__ . '/said.php';
$how = $argv[1];
$worker = new Worker();
$connect = fn () => new PDO(
    sprintf('pgsql:host=%s;port=%s;dbname=%s', getenv('PGHOST'), getenv('PGPORT'), getenv('PGDATABASE')),
    getenv('PGUSER'),
    getenv('PGPASSWORD'),
    [
        PDO::ATTR_ERRMODE => PDO::ERRMODE_EXCEPTION,
        PDO::ATTR_EMULATE_PREPARES => $how === 'emulated',
        PDO::ATTR_PERSISTENT => $how === 'persistent',
    ],
);
$db = $connect();
$insert = function () use (&$db, $worker) {
    $db->prepare("INSERT INTO written VALUES (?, ?, 'x')")->execute([$worker->run, $worker->id()]);
};
$ops = [
    'auto' => $insert,
    'transaction' => function () use (&$db, $insert) {
        $db->beginTransaction();
        $insert();
        $db->query('SELECT 1')->fetchAll();
        $db->exec('SAVEPOINT s');
        $insert();
        $db->exec('RELEASE s');
        right($db->commit(), true);
    },
    'read' => function () use (&$db) {
        $statement = $db->prepare('SELECT CAST(? AS int) + 1');
        for ($wanted = 0; $wanted < 3; $wanted++) {
            $statement->execute([$wanted]);
            right((int) $statement->fetchColumn(), $wanted + 1);
        }
    },
    'scroll' => function () use (&$db) {
        $statement = $db->prepare('SELECT generate_series(1, 30)', [PDO::ATTR_CURSOR => PDO::CURSOR_SCROLL]);
        $statement->execute();
        for ($wanted = 1; $wanted <= 3; $wanted++) {
            right((int) $statement->fetch(PDO::FETCH_NUM, PDO::FETCH_ORI_NEXT)[0], $wanted);
            usleep(2000);
        }
        $statement->closeCursor();
    },
    'copy_in' => function () use (&$db, $worker) {
        $rows = ["$worker->run\t{$worker->id()}\tx", "$worker->run\t{$worker->id()}\tx"];
        right($db->pgsqlCopyFromArray('written', $rows), true);
    },
    'copy_out' => function () use (&$db) {
        right(count($db->pgsqlCopyToArray('(SELECT generate_series(1, 500))')), 500);
    },
    'script' => function () use (&$db, $worker) {
        $db->exec("INSERT INTO written VALUES ($worker->run, {$worker->id()}); SELECT 1");
    },
];
$worker->work(
    $ops,
    fn ($error) => $error instanceof PDOException && isset($error->errorInfo[0]) ? $error->errorInfo[0] : '-',
    function () use (&$db, $connect) {
        try {
            if ($db->inTransaction()) {
                $db->rollBack();
            }
            $db->query('SELECT 1')->fetchAll();
        } catch (PDOException $error) {
            $db = $connect();
            throw $error;
        }
    },
);
