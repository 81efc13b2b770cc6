#!/bin/sh
# Small heaps: many of these run at the same time.
exec java -Xmx64m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp "$BUILT/java:/usr/share/java/postgresql.jar:/usr/share/java/HikariCP.jar:/usr/share/java/slf4j-api.jar:/usr/share/java/slf4j-nop.jar" WithPgjdbc "$@"
