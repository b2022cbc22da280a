// The worker of Go: net.Dialer and net/http with LocalAddr, as `bench.peers` has it for Python's clients.
//
//	peer connect|get|keepalive DEVICE SOURCE TARGET PORT
//
// For each "COUNT AT_ONCE" on standard input it makes so many connections or requests, so many at the same time, and
// prints the seconds of CPU and of wall time that this took.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func connects(dialer *net.Dialer, target string) func() {
	return func() {
		connection, err := dialer.Dial("tcp4", target)
		check(err)
		check(connection.Close())
	}
}

func requests(dialer *net.Dialer, target string, keep bool) func() {
	client := http.Client{Transport: &http.Transport{
		DialContext: dialer.DialContext, DisableKeepAlives: !keep, DisableCompression: true, MaxIdleConnsPerHost: 100,
	}}
	return func() {
		response, err := client.Get("http://" + target + "/")
		check(err)
		_, err = io.Copy(io.Discard, response.Body)
		check(err)
		check(response.Body.Close())
	}
}

func cpu() float64 {
	var usage syscall.Rusage
	check(syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
}

func main() {
	// os.Args[2] is the device: Go has no way to name one but a Control function, which few write.
	workload, source, target := os.Args[1], os.Args[3], net.JoinHostPort(os.Args[4], os.Args[5])
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	once := connects(dialer, target)
	if workload != "connect" {
		once = requests(dialer, target, workload == "keepalive")
	}
	for {
		var count, atOnce int
		if _, err := fmt.Scan(&count, &atOnce); err != nil {
			return
		}
		cpuBefore, wallBefore := cpu(), time.Now()
		var group sync.WaitGroup
		for task := 0; task < atOnce; task++ {
			group.Add(1)
			go func() {
				defer group.Done()
				for at := 0; at < count/atOnce; at++ {
					once()
				}
			}()
		}
		group.Wait()
		fmt.Printf("%.6f %.6f\n", cpu()-cpuBefore, time.Since(wallBefore).Seconds())
	}
}
