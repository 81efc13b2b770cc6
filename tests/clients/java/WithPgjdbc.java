import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.io.StringReader;
import java.io.StringWriter;
import java.nio.file.Files;
import java.nio.file.Path;
import java.sql.Connection;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Savepoint;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import org.postgresql.PGConnection;
import org.postgresql.copy.CopyIn;

/** pgjdbc in HikariCP; the argument is what stands behind the ? of its URL. One line for each unit of work. */
public class WithPgjdbc {
    static final int RUN = Integer.parseInt(System.getenv("RUN"));
    static final int FIRST = Integer.parseInt(System.getenv("WORKER"));
    static final Path STOP = Path.of(System.getenv("STOP"));
    static final String INSERT = "INSERT INTO written VALUES (?, ?, 'x')";

    interface Op { void run(Connection connection) throws Exception; }

    static class Wrong extends Exception { Wrong(String what) { super(what); } }

    static void right(Object seen, Object wanted) throws Wrong {
        if (!seen.equals(wanted)) throw new Wrong(seen + " instead of " + wanted);
    }

    static String stateOf(Throwable error) {
        for (Throwable it = error; it != null; it = it.getCause())
            if (it instanceof SQLException sql && sql.getSQLState() != null) return sql.getSQLState();
        return "-";
    }

    static class Worker extends Thread {
        final int number;
        final HikariDataSource pool;
        int count;
        final List<String> ids = new ArrayList<>();

        Worker(int number, HikariDataSource pool) { this.number = FIRST + number; this.pool = pool; }

        long id() {
            long id = number * 1000000L + ++count;
            ids.add(Long.toString(id));
            return id;
        }

        void insert(Connection c) throws SQLException {
            try (PreparedStatement s = c.prepareStatement(INSERT)) {
                s.setInt(1, RUN);
                s.setLong(2, id());
                s.executeUpdate();
            }
        }

        Map<String, Op> ops() {
            Map<String, Op> ops = new LinkedHashMap<>();
            ops.put("auto", c -> insert(c));
            ops.put("transaction", c -> {
                c.setAutoCommit(false);
                insert(c);
                Savepoint s = c.setSavepoint();
                insert(c);
                c.releaseSavepoint(s);
                c.commit();
            });
            ops.put("read", c -> {
                try (PreparedStatement s = c.prepareStatement("SELECT ?::int + 1")) {
                    for (int wanted = 0; wanted < 7; wanted++) {
                        s.setInt(1, wanted);
                        try (ResultSet rows = s.executeQuery()) {
                            rows.next();
                            right(rows.getInt(1), wanted + 1);
                        }
                    }
                }
            });
            ops.put("batch", c -> {
                c.setAutoCommit(false);
                try (PreparedStatement s = c.prepareStatement("INSERT INTO written (run, id) VALUES (?, ?)")) {
                    for (int n = 0; n < 5; n++) {
                        s.setInt(1, RUN);
                        s.setLong(2, id());
                        s.addBatch();
                    }
                    s.executeBatch();
                }
                c.commit();
            });
            ops.put("batch_auto", c -> {
                try (PreparedStatement s = c.prepareStatement("INSERT INTO written (run, id) VALUES (?, ?)")) {
                    s.setInt(1, RUN);
                    s.setLong(2, id());
                    s.addBatch();
                    s.executeBatch();
                }
            });
            ops.put("portal", c -> {
                c.setAutoCommit(false);
                try (Statement s = c.createStatement()) {
                    s.setFetchSize(10);
                    int seen = 0;
                    try (ResultSet rows = s.executeQuery("SELECT generate_series(1, 30)")) {
                        while (rows.next()) seen++;
                    }
                    right(seen, 30);
                }
                c.commit();
            });
            ops.put("hold", c -> {
                c.setAutoCommit(false);
                try (Statement s = c.createStatement(ResultSet.TYPE_FORWARD_ONLY, ResultSet.CONCUR_READ_ONLY,
                        ResultSet.HOLD_CURSORS_OVER_COMMIT)) {
                    s.setFetchSize(10);
                    int seen = 0;
                    try (ResultSet rows = s.executeQuery("SELECT generate_series(1, 30)")) {
                        while (rows.next()) seen++;
                    }
                    right(seen, 30);
                }
                c.commit();
            });
            ops.put("copy_in", c -> {
                String rows = RUN + "\t" + id() + "\n" + RUN + "\t" + id() + "\n";
                long done = c.unwrap(PGConnection.class).getCopyAPI()
                    .copyIn("COPY written (run, id) FROM STDIN", new StringReader(rows));
                right(done, 2L);
            });
            ops.put("copy_in_slowly", c -> {
                CopyIn copy = c.unwrap(PGConnection.class).getCopyAPI().copyIn("COPY written (run, id) FROM STDIN");
                for (int n = 0; n < 2; n++) {
                    byte[] row = (RUN + "\t" + id() + "\n").getBytes();
                    copy.writeToCopy(row, 0, row.length);
                    copy.flushCopy();
                    Thread.sleep(20);
                }
                right(copy.endCopy(), 2L);
            });
            ops.put("copy_out", c -> {
                StringWriter out = new StringWriter();
                c.unwrap(PGConnection.class).getCopyAPI()
                    .copyOut("COPY (SELECT generate_series(1, 500)) TO STDOUT", out);
                right(out.toString().split("\n").length, 500);
            });
            ops.put("script", c -> {
                try (Statement s = c.createStatement()) {
                    s.execute("INSERT INTO written VALUES (" + RUN + ", " + id() + "); SELECT 1");
                }
            });
            ops.put("deallocate", c -> {
                try (Statement s = c.createStatement()) {
                    s.execute("PREPARE mine AS SELECT 1");
                    s.execute("DEALLOCATE mine");
                    s.execute("DEALLOCATE ALL");
                }
            });
            return ops;
        }

        void told(String op, String what) {
            String line = number + " " + op + " " + what.replace('\n', ' ');
            synchronized (System.out) { System.out.println(line); }
        }

        @Override public void run() {
            Map<String, Op> ops = ops();
            while (!Files.exists(STOP)) {
                for (Map.Entry<String, Op> op : ops.entrySet()) {
                    if (Files.exists(STOP)) return;
                    ids.clear();
                    try (Connection c = pool.getConnection()) {
                        try {
                            op.getValue().run(c);
                            told(op.getKey(), "ok " + (ids.isEmpty() ? "-" : String.join(",", ids)));
                        } catch (Throwable error) {
                            told(op.getKey(), error instanceof Wrong ? "wrong " + error.getMessage()
                                : "error " + stateOf(error) + " " + (ids.isEmpty() ? "-" : String.join(",", ids)) + " " + error);
                            if (!c.isClosed() && !c.getAutoCommit()) {
                                try { c.rollback(); } catch (SQLException ignored) { c.unwrap(Connection.class); }
                            }
                        }
                        Thread.sleep(5);
                    } catch (Exception error) {
                        told("lend", "error " + stateOf(error) + " - " + error);
                    }
                }
            }
        }
    }

    public static void main(String[] words) throws Exception {
        HikariConfig config = new HikariConfig();
        config.setJdbcUrl("jdbc:postgresql://" + System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/"
            + System.getenv("PGDATABASE") + "?" + (words.length > 0 ? words[0] : ""));
        config.setUsername(System.getenv("PGUSER"));
        config.setPassword(System.getenv("PGPASSWORD"));
        config.setMaximumPoolSize(3);
        config.setConnectionTimeout(30000);
        HikariDataSource pool = new HikariDataSource(config);
        Worker[] workers = {new Worker(0, pool), new Worker(1, pool)};
        for (Worker it : workers) it.start();
        for (Worker it : workers) it.join();
        pool.close();
    }
}
